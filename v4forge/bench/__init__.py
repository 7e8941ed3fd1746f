"""What a served model does: speed, draft acceptance, quality, tool calls. Imports serving and images."""
