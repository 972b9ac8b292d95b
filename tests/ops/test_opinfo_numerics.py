"""Every op of torch's OpInfo database, forward and backward, as low as its rule allows, against FP64."""
