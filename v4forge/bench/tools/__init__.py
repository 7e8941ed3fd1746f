"""Tool calls and short conversations: what is asserted of them, as data, and what plays and scores them."""
