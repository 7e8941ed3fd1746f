"""The two images: locks, patches, build, SBOM, attestation, registry; programs run in them.

Imports the ground.
"""
