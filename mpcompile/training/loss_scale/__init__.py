"""The loss scale, its floor, and what overflowed."""
