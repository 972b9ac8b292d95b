"""The table of shadows: the low copies of masters. Below the runtime and training."""
