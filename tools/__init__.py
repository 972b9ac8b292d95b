"""The command line, one verb per file. Import it as `mpcompile.tools`."""

if __name__ != "mpcompile.tools":
    raise ImportError(f"import mpcompile.tools, not {__name__}: two copies of the tools would not know each other")
