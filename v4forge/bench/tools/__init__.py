"""The tool-calling scenarios and the chats with known outcomes: played, asserted, scored.

Imports serving.
"""
