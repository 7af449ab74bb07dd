"""Time of a step as a range: roofline by class of operator, cost of launching kernels, communication. Imports no torch.

The lower end takes what devices reach at their best and hides communication behind the backward pass; the upper end
takes what they reach on small or badly shaped work and hides nothing. Measured runs lie between them unless something
is wrong with one of both, and calibration says how often they did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tunemap.planner.device import Target
from tunemap.planner.prediction import Account, Data, Work

# Share of the peak that a class of operators reaches, at best and on awkward shapes.
MATMUL, ATTENTION, MEMORY, LINK = (0.85, 0.35), (0.70, 0.15), (0.95, 0.45), (0.90, 0.40)
CPU_MATMUL = (1.0, 0.15)  # of the measured ceiling
LAUNCH_S = (4e-6, 14e-6)  # eager PyTorch, one operator: Python, dispatcher, autograd and the launch itself
CPU_OPERATOR_S = (3e-6, 25e-6)
COLLECTIVE_S = (1e-5, 6e-5)  # latency of one call
HIDDEN_SHARE = 0.6  # of a step's compute that communication can hide behind, at best
# A CPU core without a measured ceiling: from an old laptop's to one with matrix units (float32 FLOP/s, bytes/s).
CORE_FLOPS = (1.5e11, 8e9)
CORE_BYTES = (1.5e10, 2e9)
START_S = (8.0, 40.0)  # imports, process groups, the first step's caches
LOADING_BYTES_PER_S = (2e9, 2e8)


@dataclass(frozen=True)
class Speeds:
    """Of one device, at best or at worst: FLOP/s by dtype, bytes/s, seconds per operator, bytes/s to other devices."""

    matmul: Mapping[str, float]
    attention: Mapping[str, float]
    memory: float
    operator_s: float
    link: float | None
    collective_s: float


def speeds(target: Target, *, threads: int, ceilings: Mapping[str, float]) -> tuple[Speeds, Speeds] | None:
    """The best and the worst that is assumed of a device; None where its peaks are not known.

    ceilings: measured matmul FLOP/s by dtype of this very device; they take the place of the datasheet's.
    """
    hardware = target.hardware
    if not target.on_gpu:
        return _cpu(0, threads, ceilings), _cpu(1, threads, ceilings)
    if hardware is None or hardware.bandwidth_bytes_per_s is None:
        return None
    peaks: dict[str, float] = {dtype: peak for dtype, peak in hardware.peak_flops_per_s.items() if peak is not None}
    peaks |= {dtype: ceiling / MATMUL[0] for dtype, ceiling in ceilings.items()}
    # Without tensor cores for bfloat16, torch computes it as float32.
    peaks.setdefault("bfloat16", peaks["float32"])

    def of(end: int) -> Speeds:
        return Speeds(
            {dtype: peak * MATMUL[end] for dtype, peak in peaks.items()},
            {dtype: peak * ATTENTION[end] for dtype, peak in peaks.items()},
            hardware.bandwidth_bytes_per_s * MEMORY[end],  # type: ignore[operator]
            LAUNCH_S[end],
            hardware.link_bytes_per_s * LINK[end] if hardware.link_bytes_per_s else None,
            COLLECTIVE_S[end],
        )

    return of(0), of(1)


def _cpu(end: int, threads: int, ceilings: Mapping[str, float]) -> Speeds:
    known = {dtype: ceiling * CPU_MATMUL[end] for dtype, ceiling in ceilings.items()}
    flops = {dtype: known.get(dtype, CORE_FLOPS[end] * threads) for dtype in ("float32", "bfloat16", "float16")}
    memory = CORE_BYTES[end] * threads
    return Speeds(flops, flops, memory, CPU_OPERATOR_S[end], memory, COLLECTIVE_S[end] * 10)


def step_seconds(
    account: Account, data: Data, target: Target, *, threads: int, ceilings: Mapping[str, float]
) -> tuple[float, float] | None:
    """Seconds of one optimizer step at batches of mean width, at best and at worst; None where nothing is known."""
    ends = speeds(target, threads=threads, ceilings=ceilings)
    if ends is None:
        return None
    narrower = min(1.0, data.mean_width / account.batch.width)
    work = at_width(account.work, narrower)
    compute = [_seconds(work, end) + _seconds(account.optimizer, end) for end in ends]
    sent = [_communication(account, end) for end in ends]
    if sent[0] is None or sent[1] is None:
        return None
    hidden = HIDDEN_SHARE * _seconds(work, ends[0])
    low, high = compute[0] + max(0.0, sent[0] - hidden), compute[1] + sent[1]
    return low, high


def at_width(work: Work, narrower: float) -> Work:
    """The work of batches of `narrower` times the width: attention is quadratic in it, all else linear."""
    return Work(
        {dtype: round(flops * narrower) for dtype, flops in work.matmul_flops.items()},
        {dtype: round(flops * narrower**2) for dtype, flops in work.attention_flops.items()},
        round(work.matmul_bytes * narrower),
        round(work.attention_bytes * narrower),
        round(work.other_bytes * narrower),
        work.kernels,
    )


def _seconds(work: Work, end: Speeds) -> float:
    """The longer of what the device computes and what the host takes to launch it."""
    matmul = sum(flops / end.matmul[dtype] for dtype, flops in work.matmul_flops.items())
    attention = sum(flops / end.attention[dtype] for dtype, flops in work.attention_flops.items())
    device = (
        max(matmul, work.matmul_bytes / end.memory)
        + max(attention, work.attention_bytes / end.memory)
        + work.other_bytes / end.memory
    )
    return max(device, work.kernels * end.operator_s)


def _communication(account: Account, end: Speeds) -> float | None:
    calls = sum(row["calls"] for row in account.collectives)
    if not calls:
        return 0.0
    return None if end.link is None else account.sent_bytes / end.link + calls * end.collective_s


def start_seconds(account: Account, micro_batch_s: tuple[float, float], estimation_batches: int) -> tuple[float, float]:
    """Seconds before the first step: imports, loading, and what the method computes from data."""
    low, high = (
        START_S[end] + account.weights_bytes / LOADING_BYTES_PER_S[end] + estimation_batches * micro_batch_s[end]
        for end in (0, 1)
    )
    return low, high
