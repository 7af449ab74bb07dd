"""How the command lines of the workflow end: with an exit code, and a message for what a user can fix."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from tunemap.errors import UserError

STORAGE = {  # what a disk may say, and what to do about it
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EROFS: "make the results writable",
    errno.EACCES: "make it accessible",
    errno.EPERM: "make it accessible",
    errno.EIO: "look after the disk",
    errno.ESTALE: "mount the file system again",
}


def run_script(main: Callable[[], int | None]) -> None:
    """Run a command line's `main` and leave with its exit code; a UserError prints its message and gives 1."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; {STORAGE[error.errno]}, then run the workflow again", file=sys.stderr)
        code = 1
    sys.exit(code)
