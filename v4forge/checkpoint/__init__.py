"""DeepSeek-V4 checkpoints as bytes: the recipe, every tensor, number formats, safetensors in and out.

Imports the ground only.
"""
