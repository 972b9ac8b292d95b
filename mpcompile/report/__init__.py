"""The report: what was decided, as data, and its views (table, HTML, DOT)."""
