"""Numbers of a run: the plan beside FP32, and the ranges of values and gradients."""
