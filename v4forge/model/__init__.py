"""DeepSeek-V4 in torch, one block at a time, and what goes through it: chats, samples, ranks, a forward pass.

Imports checkpoint.
"""
