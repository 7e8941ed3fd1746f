"""An artifact behind one address: settings, deployment, guards, readiness, probe, status.

Imports images, and of model the chat format; no torch.
"""
