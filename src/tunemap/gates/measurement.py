"""Gates on what was measured: identities between times and counts, FLOPs, bounds, and whether the device was ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tunemap.gates.result import GateResult, gate

TOLERANCE = 0.02  # of the identities between times and between counts
EXIT_ALLOWANCE_S = 1.0  # from the last reading of the worker's clock to the end of its process
WINDOW_ALLOWANCE_S = 0.02  # per logging window: reading losses, writing records and progress
FLOPS_TOLERANCE = 0.01
SMALLEST_CPU_SHARE = 0.9  # of the wall time of a single-process step that a compute-bound process runs

# nvmlClocksEventReasons (nvml.h): slowdowns that do not belong to normal work. The power cap (0x4) does.
THROTTLE_REASONS = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@gate(2)
def batches_gate(realised: Mapping[str, int], planned: Mapping[str, int]) -> GateResult:
    """The tokens that the step loop counted, summed over ranks, are those that the schedule planned.

    Prevents: tables whose batch size is not the one that ran, and lengths that no example reaches.
    Would have stopped: 931.9 tokens/s × 0.446 s = 416 tokens a step beside a stated batch of about 1,720 (F03), and
    a sweep over max_length 1,024 and 1,536 in which every batch is the same (F23).
    """
    wrong = [
        f"{name} {realised.get(name)} instead of {count}"
        for name, count in planned.items()
        if realised.get(name) != count
    ]
    message = "; ".join(wrong) or f"all counts are as planned: {', '.join(f'{n} {c:,}' for n, c in planned.items())}"
    return GateResult("batches", not wrong, True, message)


@gate(2)
def throughput_gate(measurements: Mapping[str, Any]) -> GateResult:
    """Tokens per second = tokens per step ÷ period of a step, within 2 %.

    Prevents: a throughput and a step time that come from different runs or different definitions.
    Would have stopped: NYU's L4 row, whose throughput and step time imply a quarter of its batch (F03), and
    throughput over all planned epochs when a step limit ended the run (F41).
    """
    rate, period, tokens = (
        measurements.get(name) for name in ("tokens_per_second", "step_period_mean_s", "tokens_per_step_mean")
    )
    if not rate or not period or not tokens:
        return GateResult("throughput", False, True, "no measured step: nothing may be said of the speed")
    product = rate * period
    message = f"{rate:.1f} tokens/s × {period:.4g} s = {product:.1f} tokens a step; counted {tokens:.1f}"
    return GateResult("throughput", abs(product / tokens - 1) <= TOLERANCE, True, message)


@gate(2)
def training_time_gate(step_seconds: float, training_seconds: float, windows: int) -> GateResult:
    """The steps' times (device clock) and data waits add up to the training time (host clock), within 2 %.

    Prevents: timing the launch of work instead of the work.
    Would have stopped: Columbia's step latency without synchronisation, 103.6 s of steps in an epoch of 171.3 s (F33).

    Beside the 2 %, 0.02 s are allowed per logging window, in which losses are read and records written.
    """
    allowed = TOLERANCE * training_seconds + WINDOW_ALLOWANCE_S * windows
    message = f"steps and data waits take {step_seconds:.2f} s of {training_seconds:.2f} s of training"
    return GateResult("training_time", abs(training_seconds - step_seconds) <= allowed, False, message)


@gate(2)
def wall_gate(parts_s: float, start_s: float, outside_s: float) -> GateResult:
    """The parts that the training process counted, and its start, add up to the wall time seen from outside (2 %).

    Prevents: time that is in no column: initialisation, evaluation, compilation.
    Would have stopped: GoRA's gradient estimation and 196 SVDs, outside of every reported time (F20), and throughput
    of runs whose evaluation is inside the clock (F19).

    Beside the 2 %, 1 s is allowed for the end of the process. `start_s` is what torchrun needs before rank 0 exists.
    """
    allowed = TOLERANCE * outside_s + EXIT_ALLOWANCE_S
    message = f"parts {parts_s:.2f} s + start {start_s:.2f} s, from outside {outside_s:.2f} s"
    return GateResult("wall", abs(outside_s - parts_s - start_s) <= allowed, False, message)


@gate(8)
def flops_gate(counted: int, closed_form: int) -> GateResult:
    """The FLOPs that ran in one step, recomputation included, are the closed form's within 1 %.

    Prevents: an MFU made from a formula that does not describe what ran.
    Would have stopped: "memory-bound to compute-bound" and other causes named without counting an operation (F42).
    """
    message = f"{counted:.4g} FLOPs ran in the watched step, the closed form gives {closed_form:.4g}"
    return GateResult("flops", abs(counted / closed_form - 1) <= FLOPS_TOLERANCE, False, message)


@gate(8)
def mfu_bounds_gate(name: str, value: float) -> GateResult:
    """A utilisation is in (0, 1].

    Prevents: FLOPs, times or peaks that cannot be of the same device.
    Would have stopped: 4.2 % to 70.3 % "compute utilisation" at 14 % less step time (F06), and the L4's numbers (F03).
    """
    return GateResult("mfu_bounds", 0 < value <= 1, True, f"{name} is {value:.4g}, must be in (0, 1]")


@gate(10)
def device_gate(states: Sequence[Mapping[str, Any]], own_pids: Collection[int]) -> GateResult:
    """Nobody else computed on the GPU before or after training, and it was not slowed by heat or power supply.

    Prevents: calling a neighbour's load, or a hot card, a property of a method.
    Would have stopped: NVML readings of device 0 whoever used it (F41), and 8.1 GB used of a card that has 8 (F40).

    Inside a container process ids are the host's: one process more than ours is a stranger then. Clocks, power limit
    and temperature are in the environment of every result.
    """
    foreign, slowed = 0, set()
    for state in states:
        pids = set(state.get("process_ids") or ())
        hidden = not pids & set(own_pids)
        foreign = max(foreign, len(pids) - 1 if hidden else len(pids - set(own_pids)))
        mask = state.get("throttle_reasons") or 0
        slowed |= {reason for bit, reason in THROTTLE_REASONS.items() if mask & bit}
    problems = [f"{foreign} other process(es) on the device"] if foreign else []
    problems += sorted(slowed)
    return GateResult("device", not problems, False, "; ".join(problems) or "no other process, no throttling")


@gate(10)
def cpu_share_gate(cpu_seconds: float, wall_seconds: float) -> GateResult:
    """On a CPU, a step of one process runs at least 90 % of its wall time.

    Prevents: reading the load of a shared machine as the speed of a method.
    Would have stopped: nothing published; it is the same gate as `device` for machines without a driver to ask.
    """
    share = cpu_seconds / wall_seconds
    message = f"the process ran {share:.0%} of its steps' wall time"
    advice = "; others used the cores: compare CPU times, not wall times" if share < SMALLEST_CPU_SHARE else ""
    return GateResult("cpu_share", share >= SMALLEST_CPU_SHARE, False, message + advice)
