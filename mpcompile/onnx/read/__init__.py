"""From a file or message to a precision graph."""
