"""`python -m mpcompile` is the command line."""

from mpcompile.tools.start import main

if __name__ == "__main__":
    main()
