"""What is known of a run, for people: report and model card. Imports bench, quantization, checkpoint; a name or two of
verification, serving, images.
"""
