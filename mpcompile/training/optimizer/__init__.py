"""The update: the optimizer's own code as a graph."""
