"""Triton kernels: the optimizer's update in two passes, and the loss over a large vocabulary."""
