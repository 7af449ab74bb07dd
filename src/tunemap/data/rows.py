"""Read and write the jsonl files of prepared data: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import write_atomic


class PlacedRecord(dict[str, Any]):
    """A record of a file that knows its place there, for messages."""

    __slots__ = ("line", "path")

    def __init__(self, values: dict[str, Any], path: Path, line: int) -> None:
        super().__init__(values)
        self.path, self.line = path, line

    @property
    def place(self) -> str:
        """File and line where the record ends."""
        return f"{self.path}, line {self.line}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file; blank lines are skipped, anything else that is no object is a `UserError`."""
    rows: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(PlacedRecord(_row(line, path, number), path, number))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    return rows


def not_utf8(path: Path) -> UserError:
    """What to say of a file that cannot be decoded: the first line that is at fault."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                found = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
                return UserError(f"{path}, line {number}: not UTF-8 ({found}); save the file as UTF-8")
    return UserError(f"{path}: not UTF-8; save the file as UTF-8")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def normalised(text: str) -> str:
    """What two prompts are compared by: lower case, single spaces, no punctuation at the end."""
    return " ".join(text.lower().split()).rstrip(" .,;:!?")


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
        if "\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path}, line {number}: holds half a character (a lone \\ud800 to \\udfff); remove it"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are ValueErrors too
        raise UserError(f"{path}, line {number}: not JSON ({error}); write one object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: expected an object {{...}}, found {type(row).__name__}")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
