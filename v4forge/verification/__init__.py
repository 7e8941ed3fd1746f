"""Whether an artifact is what its config and its source ask for: checks, reference, certificate, reproduction.

Imports quantization, model and checkpoint; reference.py no decoder of theirs.
"""
