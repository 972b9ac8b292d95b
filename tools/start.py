"""Where the program begins: an error's page is answered at once, all else by the verbs and what they import."""

from __future__ import annotations

import os
import sys

from mpcompile.tools import codes


def main() -> None:
    """Run the command line; see `mpcompile.tools.main.main` for exit codes."""
    text = codes.asked(sys.argv[1:])
    if not text:
        from mpcompile.tools.main import main as verbs

        verbs()
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:  # who reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
