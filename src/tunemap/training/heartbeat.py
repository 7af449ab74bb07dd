"""Signs of life: each rank says where in which step it is, and the launcher notices when none of them moves on.

When one rank hangs, the others wait for it in their next collective, without an error and without end. The rank that
hangs is then the one that is furthest behind. Imports no torch.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

STOP = "stop"  # the file by which the launcher asks the ranks for a checkpoint and an end
PHASES = ("data", "forward", "backward", "optimizer", "window")  # of a step, in order; window: reading losses, saving


class Heartbeat:
    """Where one rank says what it begins to do: one small write in place, about two microseconds."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"heartbeat.rank{rank}"
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def beat(self, step: int, phase: str) -> None:
        """Say that `phase` of `step` begins."""
        os.pwrite(self._descriptor, f"{step:>12} {phase:<12}".encode(), 0)

    def stop(self) -> None:
        """Say that training has ended: nothing is expected of this rank any more."""
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Beat:
    """Where a rank was last."""

    rank: int
    step: int
    phase: str


def read_beats(folder: Path) -> list[Beat]:
    """The last sign of life of each rank that is training, by rank."""
    beats = []
    for path in folder.glob("heartbeat.rank*"):
        try:
            words = path.read_text().split()
        except FileNotFoundError:
            continue
        if len(words) == 2:
            beats.append(Beat(int(path.name.removeprefix("heartbeat.rank")), int(words[0]), words[1]))
    return sorted(beats, key=lambda beat: beat.rank)


class Watchdog:
    """Asked now and then, it knows for how long no rank has moved on."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        self._folder, self._limit_s = folder, limit_s
        self._last: list[Beat] = []
        self._since = time.monotonic()

    def stalled(self) -> Beat | None:
        """The rank that the others wait for, once nobody has moved for the limit; None while all is well."""
        beats, now = read_beats(self._folder), time.monotonic()
        if beats != self._last:
            self._last, self._since = beats, now
        if not beats or now - self._since <= self._limit_s:
            return None
        return min(beats, key=lambda beat: (beat.step, PHASES.index(beat.phase), beat.rank))
