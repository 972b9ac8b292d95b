"""The whole step as one graph."""
