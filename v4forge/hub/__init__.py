"""Bytes from the hub and to it: fetch and publish, every file by its hash.

Imports checkpoint.
"""
