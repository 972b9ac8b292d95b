"""The compiler passes, one per file. Import them as `mpcompile.passes`."""

if __name__ != "mpcompile.passes":
    raise ImportError(f"import mpcompile.passes, not {__name__}: two copies of the passes would not know each other")
