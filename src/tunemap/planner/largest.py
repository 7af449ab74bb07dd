"""The largest batch or length of a run that a device holds: first by the planner, then, if asked, by running it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.planner import device
from tunemap.planner.cache import NoAccount, account_key, read_account, write_account
from tunemap.planner.data import data_of
from tunemap.planner.device import TIGHT_SHARE, Target
from tunemap.planner.plan import make_account
from tunemap.planner.prediction import Data
from tunemap.run import Run

FACTORS = ("per_device_batch_size", "max_length")
MOST = 1 << 20  # no run has more rows or tokens than that
PROBED_STEPS = 3  # the first has no optimizer states yet
SMALLER = 0.9  # of a batch that a probe could not hold, what the next probe tries


@dataclass(frozen=True)
class Probe:
    """One real run of a few steps at the widest batch."""

    value: int
    outcome: str
    peak_bytes: int | None
    held: bool


@dataclass(frozen=True)
class Largest:
    """The largest value of a factor. 0 is none.

    safe: needs at most 92 % of the memory, the error that predictions are allowed; tight: needs all of it.
    confirmed: the largest that really ran within the memory; None without probes.
    """

    run: str
    factor: str
    device: str
    memory_bytes: int
    safe: int
    safe_bytes: int
    tight: int
    tight_bytes: int
    confirmed: int | None = None
    probes: tuple[Probe, ...] = ()


def largest_below(needed: Callable[[int], int], limit: int, *, most: int = MOST) -> int:
    """The largest n in 1…most with needed(n) ≤ limit, for a function that does not fall; 0 where there is none.

    Memory is nearly a straight line in rows, and a parabola at worst in length, so the next look is where the line
    through the last two values meets the limit. Steps double until a value does not fit; once there is one, a
    bisection takes over where the line does not halve what is left.
    """
    known = {1: needed(1)}
    if known[1] > limit:
        return 0
    low, high = 1, most + 1  # fits, does not fit (or is not allowed)
    step, guess = 1, 4
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = needed(guess)
        width = high - low
        low, high = (guess, high) if known[guess] <= limit else (low, guess)
        guess = _where_the_line_meets(known, low, high, limit)
        if high > most:
            step *= 2
            guess = max(guess, low + step)
        elif high - low > width // 2:
            guess = (low + high) // 2
    return low


def largest_power_below(needed: Callable[[int], int], limit: int, *, most: int) -> int:
    """The largest power of two in 1…most with needed(n) ≤ limit, for a function that does not fall; 0 if there is none.

    A bisection of the exponents: three looks among the powers up to 64.
    """
    low, high = -1, most.bit_length()  # exponents: fits, does not fit (or is not allowed)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(1 << middle) <= limit else (low, middle)
    return 1 << low if low >= 0 else 0


def _where_the_line_meets(known: dict[int, int], low: int, high: int, limit: int) -> int:
    """Through the two values next to the limit."""
    other = high if high in known else max((n for n in known if n < low), default=low)
    if known[other] == known[low]:
        return low + 1
    slope = (known[other] - known[low]) / (other - low)
    return low + int((limit - known[low]) / slope)


def largest_planned(
    run: Run, factor: str, target: Target, *, data_root: Path, results: Path, progress: Callable[[int], None]
) -> Largest:
    """What the planner says. Raises UserError where the memory is not known, or the run cannot be accounted for."""
    if target.memory_bytes is None:
        raise UserError(f"the memory of {target.name} is not known: give --memory-gb, or --gpu with a described one")

    def needed(value: int) -> int:
        progress(value)
        return _needed_bytes(run, factor, value, target, data_root, results)

    most = most_of(run, factor, data_root, results)
    seen: dict[int, int] = {}

    def remembered(value: int) -> int:
        if value not in seen:
            seen[value] = needed(value)
        return seen[value]

    safe = largest_below(remembered, int(target.memory_bytes * TIGHT_SHARE), most=most)
    tight = largest_below(remembered, target.memory_bytes, most=most)
    return Largest(
        run.id,
        factor,
        target.name,
        target.memory_bytes,
        safe,
        remembered(max(1, safe)),
        tight,
        remembered(max(1, tight)),
    )


def most_of(run: Run, factor: str, data_root: Path, results: Path) -> int:
    """The largest value of a factor that makes sense, whatever the memory."""
    return MOST if factor == "per_device_batch_size" else positions_of(run, data_root, results)


def positions_of(run: Run, data_root: Path, results: Path) -> int:
    """The longest sequence that the model was made for."""
    from tunemap.planner.models import architecture_of

    config = architecture_of(run.model, results / "shared" / "models" / run.model_key, data_root)
    return int(getattr(config, "max_position_embeddings", MOST))


def _needed_bytes(run: Run, factor: str, value: int, target: Target, data_root: Path, results: Path) -> int:
    changed = with_factor(run, factor, value)
    data = _at(data_of(run if factor == "max_length" else changed, results), factor, value)
    key = account_key(changed, data, on_gpu=target.on_gpu)
    found = read_account(key, results)
    if found is None:
        found = make_account(changed, data, target, data_root=data_root, results=results)
        write_account(key, found, results)
    if isinstance(found, NoAccount):
        raise UserError(f"{run.id}: {found.reason}; nothing can be planned, use --probe with a batch of your own")
    needed = device.needed_bytes(found, target, devices=run.factors.gpus)
    return needed if target.on_gpu else needed * run.factors.gpus


def _at(data: Data, factor: str, value: int) -> Data:
    """With the rows of the data as they are, or every row of a given length."""
    if factor == "per_device_batch_size":
        return data
    return replace(data, batch=replace(data.batch, width=value, label_tokens=None))


def with_factor(run: Run, factor: str, value: int, **others: Any) -> Run:
    """The same run with one factor changed, and perhaps more."""
    return run.model_copy(update={"factors": run.factors.model_copy(update={factor: value, **others})})


# --- by running it ----------------------------------------------------------------------------------------


def confirmed(found: Largest, probe: Callable[[int], Probe], *, most: int) -> Largest:
    """Run what the planner found: down from the safe value until one holds, else up while they hold, then in between.

    Where nothing is safe, down from the tight one. Up is first the tight value, which the planner may have put too low,
    then twice as far beyond it each time, to twice its value or to `most`, where the search ends even if that holds.
    """
    probes: list[Probe] = []

    def holds(value: int) -> bool:
        probes.append(probe(value))
        return probes[-1].held

    value, held, fails = found.safe or found.tight, 0, 0  # 0: none known
    while value > 0 and not held:
        held, fails = (value, fails) if holds(value) else (0, value)
        value = min(value - 1, int(value * SMALLER))
    end, step = min(2 * found.tight, most), _precision(found.tight)
    while held and not fails and held < end:
        value = found.tight if held < found.tight else min(held + step, end)
        step = step if held < found.tight else 2 * step
        held, fails = (value, 0) if holds(value) else (held, value)
    while held and fails and fails - held > _precision(held):
        value = (held + fails) // 2
        held, fails = (value, fails) if holds(value) else (held, value)
    return replace(found, confirmed=held, probes=tuple(probes))


def _precision(value: int) -> int:
    """What the largest that runs is known to: 2 %."""
    return max(1, value // 50)


def probe_run(run: Run, factor: str, value: int, target: Target, *, results: Path, device_kind: str) -> Probe:
    """Train a few steps, each as wide as the widest batch of the run; nothing of it is kept.

    Raises UserError where model or tokens of the run are not prepared yet.
    """
    from tunemap.training.launch import Paths, launch

    shared = results / "shared"
    folders = {
        "model": shared / "models" / run.model_key,
        "dataset": shared / "datasets" / run.dataset_key,
        "tokens": shared / "tokens" / run.tokens_key,
    }
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"--probe: the {name} of {run.id} is not in {folder}: snakemake {folder} prepares it")
    width = value if factor == "max_length" else data_of(run, results).batch.width
    packed = run.factors.batching == "packed"
    short = {
        "max_length": width,
        "batching": "packed" if packed else "fixed_length",
        "max_steps": PROBED_STEPS,
        "epochs": None,
        "warmup_steps": 0,
        "measurement_warmup_steps": 0,
        "logging_steps": PROBED_STEPS,
    }
    probed = with_factor(run, factor, value, **{name: one for name, one in short.items() if name != factor})
    with tempfile.TemporaryDirectory(prefix="tunemap-probe-") as name:
        work = Path(name)
        paths = Paths(**folders, work=work / "work", weights=work / "weights", steps=work / "steps.csv",
                      outcome=work / "outcome.json")  # fmt: skip
        with _printing_to_stderr():
            launch(probed, paths, device=device_kind)
        outcome = read_json(paths.outcome)
    measured = outcome["measurements"]
    on_host = measured.get("host_rss_peak_bytes")  # of one process, as `needed` counts where there is no GPU
    peak = measured.get("peak_reserved_bytes") if target.on_gpu else on_host and on_host * run.factors.gpus
    assert target.memory_bytes is not None
    if outcome["outcome"] in ("error", "invalid", "unsupported"):
        raise UserError(f"--probe: {factor} {value} ended with {outcome['outcome']}: {outcome['reason']}")
    held = outcome["outcome"] == "ok" and peak is not None and peak <= target.memory_bytes
    return Probe(value, outcome["outcome"], peak, held)


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Also what started processes print: standard output is for the answer."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
