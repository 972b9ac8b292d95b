"""`python -m mpcompile` is the command line."""

from mpcompile.tools.main import main

if __name__ == "__main__":
    main()
