"""Front ends: read a framework's graph into a precision graph, and write the decided one back. They never decide."""
