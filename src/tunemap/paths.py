"""Where relative paths of a study start."""

from __future__ import annotations

import os

from tunemap.errors import UserError


def expanded(data_root: str | None) -> str:
    """A data root with ~ and $VARIABLES expanded; the working directory where none is given."""
    if data_root is None:
        return "."
    path = os.path.expandvars(os.path.expanduser(data_root))
    if "$" in path:
        raise UserError(f"data_root: {data_root}: the variable is not set; export it, or write the path itself")
    return path
