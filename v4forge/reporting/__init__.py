"""What is known of a run, for people: report and model card.

Imports bench, quantization and checkpoint; a name or two of verification, serving and images.
"""
