"""Torch graphs: captured, read, rewritten and written. Knows torch, never a verdict."""
