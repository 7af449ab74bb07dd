"""Time: the phases of each training step without hidden synchronisation, and the parts that make up a run's wall."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PHASES = ("data", "forward", "backward", "optimizer")
PARTS = ("load", "compile", "estimation", "training", "evaluation", "checkpoint", "save", "other")


@dataclass(frozen=True)
class StepTimes:
    """The times of one optimizer step, in seconds, by the clock of the device that did the work.

    step_time_s: from `begin` to `end` less `data_time_s`: forward, backward and optimizer of every
        micro-batch and whatever ran between the last mark and `end` (scheduler, clearing gradients).
    data_time_s: waiting for batches. On a GPU it is the *exposed* wait: a batch that arrives while the
        device is still busy with earlier work costs nothing, and reads as nothing.
    forward_time_s, backward_time_s, optimizer_time_s: sums over the micro-batches of the step.
    cpu_time_s: CPU time of this process over the step, all threads, data wait included. On a CPU that is
        shared with strangers, it is the steadier of the two numbers.

    The period of a step, by which throughput divides, is step_time_s + data_time_s.
    """

    step: int
    step_time_s: float
    data_time_s: float
    forward_time_s: float
    backward_time_s: float
    optimizer_time_s: float
    cpu_time_s: float


class Timer(Protocol):
    """A source of time stamps that cost microseconds to take and are read later."""

    def stamp(self) -> Any: ...

    def wait(self, stamp: Any) -> None:
        """Return once the stamp, and so every earlier one, can be read."""

    def seconds(self, earlier: Any, later: Any) -> float: ...

    def recycle(self, stamps: Sequence[Any]) -> None: ...


class HostTimer:
    """Stamps are nanoseconds of the host's monotonic clock."""

    stamp = staticmethod(time.perf_counter_ns)

    def wait(self, stamp: int) -> None:
        return

    def seconds(self, earlier: int, later: int) -> float:
        return (later - earlier) / 1e9

    def recycle(self, stamps: Sequence[int]) -> None:
        return


class CudaTimer:
    """Stamps are CUDA events on the current stream of the device: recorded by the device when it gets there."""

    def __init__(self, device: Any) -> None:
        import torch

        self._cuda = torch.cuda
        self._device = torch.device(device)
        self._free: list[Any] = []

    def stamp(self) -> Any:
        event = self._free.pop() if self._free else self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return event

    def wait(self, stamp: Any) -> None:
        stamp.synchronize()

    def seconds(self, earlier: Any, later: Any) -> float:
        return earlier.elapsed_time(later) / 1e3

    def recycle(self, stamps: Sequence[Any]) -> None:
        self._free.extend(stamps)


def _device_timer(device: Any) -> Timer:
    """CUDA events for a CUDA device, the host's clock for the CPU; other devices have no stamps here."""
    kind = str(device).partition(":")[0]
    if kind == "cpu":
        return HostTimer()
    if kind == "cuda":
        return CudaTimer(device)
    raise ValueError(f"device {device!s}: the step clock knows 'cpu' and 'cuda'")


class StepClock:
    """Phase times of training steps; nothing is synchronised until `flush`.

    ::

        clock.begin(step)
        for micro_batch in ...:
            batch = next(batches);  clock.mark("data")
            loss = model(**batch);  clock.mark("forward")
            loss.backward();        clock.mark("backward")
        optimizer.step();           clock.mark("optimizer")
        clock.end()
        ...
        records = clock.flush()     # at a logging window: waits for the device once

    `mark(phase)` names the phase that has just ended; a phase that occurs several times in a step is summed.
    """

    def __init__(self, device: Any = "cpu") -> None:
        self._timer = _device_timer(device)
        self._stamp = self._timer.stamp
        self._finished: list[tuple[int, list[tuple[str, Any]], int]] = []
        self._marks: list[tuple[str, Any]] | None = None
        self._step = 0
        self._cpu_ns = 0

    def begin(self, step: int) -> None:
        """Open a step. Raises RuntimeError if the one before is still open."""
        if self._marks is not None:
            raise RuntimeError(f"step {self._step} was not ended before step {step} began")
        self._step = step
        self._cpu_ns = time.process_time_ns()
        self._marks = [("begin", self._stamp())]

    def mark(self, phase: str) -> None:
        """Say that `phase` (one of PHASES) has just ended."""
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}: {', '.join(PHASES)}")
        if self._marks is None:
            raise RuntimeError(f"mark({phase!r}) outside a step: call begin() first")
        self._marks.append((phase, self._stamp()))

    def end(self) -> None:
        """Close the step; it is counted by the next `flush`."""
        if self._marks is None:
            raise RuntimeError("end() without begin()")
        self._marks.append(("end", self._stamp()))
        self._finished.append((self._step, self._marks, time.process_time_ns() - self._cpu_ns))
        self._marks = None

    def flush(self) -> list[StepTimes]:
        """Wait for the device to finish the steps ended so far and return their times, in order."""
        if not self._finished:
            return []
        finished, self._finished = self._finished, []
        self._timer.wait(finished[-1][1][-1][1])
        records = [self._record(step, marks, cpu_ns) for step, marks, cpu_ns in finished]
        for _, marks, _ in finished:
            self._timer.recycle([stamp for _, stamp in marks])
        return records

    def _record(self, step: int, marks: list[tuple[str, Any]], cpu_ns: int) -> StepTimes:
        spent = dict.fromkeys((*PHASES, "end"), 0.0)
        for (_, earlier), (phase, later) in pairwise(marks):
            spent[phase] += self._timer.seconds(earlier, later)
        return StepTimes(
            step=step,
            step_time_s=sum(seconds for phase, seconds in spent.items() if phase != "data"),
            data_time_s=spent["data"],
            forward_time_s=spent["forward"],
            backward_time_s=spent["backward"],
            optimizer_time_s=spent["optimizer"],
            cpu_time_s=cpu_ns / 1e9,
        )


class PartsTimer:
    """Wall time of a run, split into PARTS: at each instant exactly one part is running.

    Parts may nest (a checkpoint inside training): the inner one's time is not the outer one's.
    What happens in no part is `other`, so that Σ parts = wall by construction here; the check that means
    something compares the sum with the wall time that the launcher saw from outside the process.
    """

    def __init__(self, *, since_process_start: bool = False) -> None:
        """Start. With `since_process_start`, the interpreter's start and imports are counted as `load`."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._open = ["other"]
        self._now_ns = time.perf_counter_ns()
        self._cpu_ns = time.process_time_ns()
        if since_process_start:
            self._seconds["load"] = process_age_s()
            self._cpu_ns = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Attribute the body to part `name`."""
        if name not in PARTS:
            raise ValueError(f"unknown part {name!r}: {', '.join(PARTS)}")
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds of each part up to now, every part present."""
        self._settle()
        return dict(self._seconds)

    def wall_s(self) -> float:
        """Wall seconds up to now: the sum of the parts."""
        return sum(self.seconds().values())

    def cpu_s(self) -> float:
        """CPU seconds of this process (all threads) over the same span."""
        return (time.process_time_ns() - self._cpu_ns) / 1e9

    def _settle(self) -> None:
        now_ns = time.perf_counter_ns()
        self._seconds[self._open[-1]] += (now_ns - self._now_ns) / 1e9
        self._now_ns = now_ns


@dataclass(frozen=True)
class Moment:
    """A moment that two processes can compare, also when somebody sets the clock in between."""

    boot: str  # of this machine, random; empty where the system does not tell
    since_boot_s: float  # a clock that nobody sets, of one machine
    unix_s: float  # between machines there is no other

    @classmethod
    def now(cls, *, ago_s: float = 0.0) -> Moment:
        """This moment, or that of `ago_s` seconds ago."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        clock = getattr(time, "CLOCK_BOOTTIME", None)
        since_boot_s = time.monotonic() if clock is None else time.clock_gettime(clock)
        return cls(boot.read_text().strip() if boot.exists() else "", since_boot_s - ago_s, time.time() - ago_s)

    def seconds_until(self, later: Moment) -> float:
        """Seconds from this moment to a later one; negative where it was earlier."""
        if self.boot and self.boot == later.boot:
            return later.since_boot_s - self.since_boot_s
        return later.unix_s - self.unix_s


def process_age_s() -> float:
    """Wall seconds since this process started, to about 10 ms (the kernel's tick).

    Linux counts the start in ticks since boot (field 22 of /proc/PID/stat, proc(5)); elsewhere psutil's answer.
    """
    stat = Path("/proc/self/stat")
    if stat.exists():
        after_name = stat.read_text().rpartition(")")[2].split()
        started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    import psutil

    return time.time() - psutil.Process().create_time()


@dataclass(frozen=True)
class Summary:
    """A sample of times, in the unit of the sample. sd has n - 1 below the line; cv = sd / mean.

    sd and cv are None for a single value, cv also where the mean is not positive.
    """

    n: int
    mean: float
    sd: float | None
    cv: float | None
    median: float
    p95: float


def summarise(step_times: Sequence[float]) -> Summary:
    """n, mean, sample standard deviation, coefficient of variation, median and 95th percentile (linear).

    Raises ValueError for an empty sample: there is no summary of nothing.
    """
    if len(step_times) == 0:
        raise ValueError("no step times to summarise")
    sample = np.asarray(step_times, dtype=float)
    mean = float(sample.mean())
    sd = float(sample.std(ddof=1)) if sample.size > 1 else None
    return Summary(
        n=int(sample.size),
        mean=mean,
        sd=sd,
        cv=sd / mean if sd is not None and mean > 0 else None,
        median=float(np.median(sample)),
        p95=float(np.percentile(sample, 95)),
    )
