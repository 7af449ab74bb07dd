"""How the command lines of the workflow end: with an exit code, and a message for what a user can fix."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tunemap.errors import UserError


def run_script(main: Callable[[], int | None]) -> None:
    """Run a command line's `main` and leave with its exit code; a UserError prints its message and gives 1."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)
