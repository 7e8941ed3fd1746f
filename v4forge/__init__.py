"""DeepSeek-V4-Flash from its upstream bytes to a verified W4A16 + FP8 + BF16-MTP artifact, one layer at a time."""
