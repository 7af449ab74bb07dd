"""The one exception whose message is meant for the person at the keyboard, and the wording of common messages."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A problem that the user can fix; the command line prints its message without a traceback."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or None where none is alike."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Message for a key that does not exist, with the nearest known one and all allowed ones."""
    known = list(known)
    meant = nearest(key, known)
    hint = f"; did you mean '{meant}'?" if meant else "."
    return f"unknown key '{key}'{hint} Allowed: {', '.join(known)}"


def refuse_outside(option: str, value: float, most: float) -> None:
    """Raise UserError for what is not above 0 and at most `most`; nan and infinity never are."""
    if not 0 < value <= most:
        raise UserError(f"{option} {value:g}: allowed are numbers above 0, up to {most:,.15g}")
