"""The training step: loss scale, optimizer, state, and the step that is emitted from them."""
