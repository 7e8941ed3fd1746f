"""Making models/tiny: its texts, its chats, its training."""
