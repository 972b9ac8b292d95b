"""From a decided precision graph to a message."""
