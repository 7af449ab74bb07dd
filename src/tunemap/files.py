"""Reading and writing result files so that a kill at any moment leaves the old file or the new one, never a half."""

from __future__ import annotations

import csv
import fcntl
import glob
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tunemap.errors import UserError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` under a temporary name in the same folder, sync it to disk, then rename it to `path`."""
    write_atomic_chunks(path, [content])


def write_atomic_chunks(path: Path, chunks: Iterable[str | bytes]) -> None:
    """The same for a content that is made piece by piece and never held as a whole; text is written as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _lock(file.fileno())  # until it has its name: an unlocked temporary file is a killed writer's
            for chunk in chunks:
                file.write(chunk.encode() if isinstance(chunk, str) else chunk)
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private; results are shared with a team
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


_TEMPORARY = ".tmp"


def _lock(descriptor: int) -> bool:
    """Lock an open file; false if somebody else has it, or where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(path: Path) -> None:
    """Remove what writers of `path` left behind that were killed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_TEMPORARY}"):
        try:
            with left.open("rb") as file:
                if _lock(file.fileno()):
                    left.unlink(missing_ok=True)
        except OSError:  # gone meanwhile, or somebody else's
            continue


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time read `path` and write it again; where the file system knows no locks, go on without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file of its own, for `path` is replaced. It stays: whoever removed it would take it from those who wait for it.
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically; NaN and infinity are refused."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken one is a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete the file and run the workflow again") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; anything else is a `UserError` that names it."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged (no JSON object)")
    return value


# What code raises that is given other contents than a workflow writes.
DAMAGE = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, csv.Error)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let what fails in the body be a `UserError` that names the file whose contents it works on."""
    try:
        yield
    except DAMAGE as error:
        why = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{path}: damaged ({why})") from None


SEAL = "seal"  # the key of a result that holds the checksum of all others


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object together with the checksum of its content."""
    write_json(path, value | {SEAL: seal_of(value)})


def seal_of(value: dict[str, Any]) -> str:
    """SHA-256 of an object's canonical JSON, its seal left out."""
    plain = json.loads(json.dumps({key: inner for key, inner in value.items() if key != SEAL}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON object whose content must fit its seal, where it has one; `UserError` where it does not."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; delete the file and run the workflow again")
    if not _seal_fits(value):
        raise UserError(f"{path}: changed after it was written: its seal does not fit; {_ADVICE}")
    return value


def _seal_fits(value: dict[str, Any]) -> bool:
    """Whether a seal is whole; true where there is none, but not where a seal has lost its name."""
    if SEAL in value:
        return bool(value[SEAL] == seal_of(value))
    *others, (_, last) = value.items() or [("", None)]  # a seal is the last value
    return last != seal_of(dict(others))


_ADVICE = "delete the folder that it is in and run the workflow again"


def damaged(folder: Path, problem: str) -> UserError:
    """What to raise for a folder of results that is not as it was written: it is set aside, so that nobody uses it."""
    aside = folder.with_name(f"{folder.name}.damaged")
    for number in itertools.count(2):
        if not aside.exists():
            break
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    try:
        folder.rename(aside)
    except OSError as error:
        return UserError(f"{problem}; {folder} cannot be set aside ({error.strerror}): move it away and run again")
    return UserError(f"{problem}; {folder} was set aside as {aside.name}; run the workflow again, which makes it anew")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
