"""From the source to the artifact: Hessians, GPTQ, the layer loop, layer files, postprocess, manifest.

Imports model and checkpoint.
"""
