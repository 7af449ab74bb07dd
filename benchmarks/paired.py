"""What benchmarks share: ratios of two ways to do the same work, taken in turns so that drift falls on both alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np

from tunemap.statistics import mean

DRAWS = 10_000
P = ParamSpec("P")
T = TypeVar("T")


class Ratio(NamedTuple):
    """Median over blocks of b's time over a's, with a 95 % bootstrap interval over blocks."""

    ratio: float
    low: float
    high: float


def in_turns(a: Callable[[], None], b: Callable[[], None], blocks: int) -> np.ndarray:
    """CPU and wall seconds of `blocks` blocks a b b a, as [block, a | b, wall | CPU]; in them linear drift cancels."""
    times = np.zeros((blocks, 2, 2))
    for block in range(blocks):
        for which in (0, 1, 1, 0):
            start = _now()
            (a, b)[which]()
            times[block, which] += _now() - start
    return times


def ratio_of(times: np.ndarray) -> Ratio:
    """The ratio b / a of the times [block, a | b] of one clock."""
    ratios = times[:, 1] / times[:, 0]
    samples = np.random.default_rng(0).choice(ratios, size=(DRAWS, ratios.size))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def mean_of_rounds(ratios: Sequence[float]) -> dict[str, float | None]:
    """Geometric mean of a ratio over the rounds, with its interval: of one round there is none."""
    interval = asdict(mean(np.log(ratios)))
    return {name: None if math.isnan(value) else math.exp(value) for name, value in interval.items()}


def shown(interval: Mapping[str, float | None], digits: int = 3) -> str:
    """An estimate with its interval, or alone."""
    if interval["low"] is None:
        return f"{interval['estimate']:.{digits}f}"
    return f"{interval['estimate']:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


class TimeLimit:
    """Minutes that a benchmark may take, None for all that it needs; asked before each of its parts."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._before, self._longest_s = clock, clock(), 0.0
        self._end = math.inf if minutes is None else self._before + 60 * minutes

    def another(self) -> bool:
        """Whether one more part, as long as the longest so far, fits into what is left."""
        now = self._clock()
        self._longest_s, self._before = max(self._longest_s, now - self._before), now
        return now + self._longest_s <= self._end


def in_own_process(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function in a new process, which takes with it what a library keeps of a device until its process ends."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments, **options).result()


def time_left(began: float, done: int, of: int) -> str:
    """How long the rest takes at the pace so far; `began` is `time.perf_counter()` at the start."""
    return f"{(time.perf_counter() - began) / done * (of - done):.0f} s left"


def _now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])
