"""The training step inside other people's loops. Each module imports its host; nothing of the library imports them."""
