"""Rewrites of ATen graphs that change no result: masks, aligned products, logits and losses in chunks."""
