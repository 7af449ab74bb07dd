"""Read and write the jsonl files of prepared data: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import write_atomic


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file; blank lines are skipped, anything else that is no object is a `UserError`."""
    rows: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_row(line, path, number))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def normalised(text: str) -> str:
    """What two prompts are compared by: lower case, single spaces, no punctuation at the end."""
    return " ".join(text.lower().split()).rstrip(" .,;:!?")


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: expected an object {{...}}, found {type(row).__name__}")
    return row
