"""What may become of a mutated input: it is taken, or it is refused in words that name file, place and remedy."""

import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunemap.errors import UserError

LIMIT_S = 20.0  # an input that takes longer hangs
LONGEST_REFUSAL = 20_000  # characters; a screen or two of problems
TAKEN = "taken"

# Kinds of refusal by what their words begin or hold; the first that fits counts.
KINDS = {
    "syntax": r"not valid YAML|not JSON|not valid JSON|damaged JSON|nested too deeply|nested more|not UTF-8|cells, but"
    r"|not a table|empty|a study is a mapping|not a trace|no nsys export|no column|no field|found (list|str|int|float)",
    "damaged": r"damaged|truncated|malformed|cannot read this SQLite|is writing this file|unfinished changes",
    "unknown key": r"unknown key",
    "missing key": r"the key '.*' is missing|needs the key|given; set it",
    "name": r"unknown (model|dataset|method|prompt_template)|a key must be text|occurs \d+ times|is reserved|name '",
    "choice": r"is not allowed|must be one of|expected ",
    "value": r"should be|is text to YAML|cannot be read as|beyond|half a character|it should|is empty|wrong type"
    r"|holds something else|rows asked for|different rows",
    "file": r"no such file|is no folder|is no \.|not described|variable is not set",
}
_FAULTY_WORDS = re.compile(r"Traceback|<class '|object at 0x|errors\.pydantic|Errno")


class HangError(BaseException):
    """Raised by the alarm clock inside of what hangs; no `except Exception` swallows it."""


class FaultError(AssertionError):
    """An input that the package handles wrongly: a traceback, a hang, accepted nonsense, a poor message."""


@dataclass(frozen=True)
class Verdict:
    """What became of one input."""

    kind: str  # TAKEN, or a kind of refusal
    seconds: float
    message: str = ""


def judge(read: Callable[[], None], path: Path, *, nonsense: str | None = None) -> Verdict:
    """Let `read` read `path`; raises FaultError for anything but success or a UserError with good words.

    `nonsense` says why the input must be refused, where that is known.
    """
    previous = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    started = time.perf_counter()
    try:
        read()
    except UserError as error:
        refusal = str(error)
    except FaultError:
        raise
    except HangError:
        raise FaultError(f"hangs for more than {LIMIT_S:g} s") from None
    except BaseException as error:
        raise FaultError(f"{type(error).__name__}: {error}") from error
    else:
        if nonsense is not None:
            raise FaultError(f"was taken, although {nonsense}")
        return Verdict(TAKEN, time.perf_counter() - started)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    check_words(refusal, path)
    return Verdict(kind_of(refusal), time.perf_counter() - started, refusal)


def check_words(refusal: str, path: Path) -> None:
    """A refusal names the file, fits on a screen, and is no inner error in disguise."""
    if str(path) not in refusal:
        raise FaultError(f"does not name the file: {refusal[:300]}")
    if len(refusal) > LONGEST_REFUSAL:
        raise FaultError(f"has {len(refusal)} characters: {refusal[:300]}")
    if found := _FAULTY_WORDS.search(refusal):
        raise FaultError(f"says {found[0]!r}: {refusal[:300]}")


def kind_of(refusal: str) -> str:
    """The kind of a refusal by its first problem."""
    lines = refusal.splitlines()
    problem = lines[1] if len(lines) > 1 else refusal
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, problem)), "combination")


def _hang(*_: object) -> None:
    raise HangError
