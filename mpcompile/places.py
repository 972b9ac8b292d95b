"""Where a file may be written: asked before work is done for it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def unwritable(path: str | os.PathLike[str]) -> str:
    """Why no file can be written at `path`; "" when one can. No directory is made for it.

    >>> unwritable("/no/such/folder/file")
    "there is no folder '/no/such/folder'"
    """
    target = Path(path)
    try:
        if "\0" in str(target):
            return "there is a zero byte in the name"
        folder = target.parent
        if not folder.is_dir():
            return f"there is no folder {str(folder)!r}"
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"the folder {str(folder)!r} may not be written to"
        if target.is_dir():
            return "it is a folder"
        if target.exists() and not stat.S_ISREG(target.stat().st_mode):
            return "it is no file, but a pipe or a device"
        if target.exists() and not os.access(target, os.W_OK):
            return "the file there may not be written to"
    except OSError as error:  # a name too long
        return str(error)
    return ""
