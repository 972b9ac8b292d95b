"""The training step on several ranks: who they are, what they send, and what they agree on."""
