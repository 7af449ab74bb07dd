"""From device work back to the host call that launched it: phase, latency, queue."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tunemap.trace.arrays import Array, Copies, Kernels
from tunemap.trace.host import Host


@dataclass(frozen=True)
class Launches:
    """For each kernel or copy, what the host did for it."""

    known: Array  # the capture has the call
    start_ns: Array  # when the call began; meaningless where not known
    end_ns: Array  # when it returned
    phase: Array  # code into Host.phases


def kernel_launches(host: Host, kernels: Kernels, on_cpu: bool) -> Launches:
    """Launches of kernels; an operator of the CPU launches itself, on its own thread."""
    if on_cpu:
        phase = host.phase_at(kernels.stream, kernels.start_ns)
        return Launches(np.ones(len(kernels), bool), kernels.start_ns, kernels.start_ns, phase)
    return _launches(host, kernels.correlation)


def copy_launches(host: Host, copies: Copies) -> Launches:
    """Launches of copies and memsets."""
    return _launches(host, copies.correlation)


def _launches(host: Host, correlation: Array) -> Launches:
    row = host.launch_row(correlation)
    known = row >= 0
    if len(host.calls) == 0:
        nothing = np.zeros(len(row), np.int64)
        return Launches(known, nothing, nothing, np.full(len(row), host.none, np.int16))
    start, thread = host.calls.start_ns[row], host.calls.thread[row]
    phase = host.phase_at(thread, start)
    phase[~known] = host.none
    return Launches(known, start, host.calls.end_ns[row], phase)


def launch_facts(kernels: Kernels, launches: Launches, on_cpu: bool, window_ns: int) -> dict[str, Any]:
    """Launch latency and queue of one device.

    latency: start of the kernel minus start of the call; wait: minus end of the call (negative when the kernel began
    before the call returned). CUPTI gives a few negative latencies (pytorch/kineto#1380): they are counted, not
    clipped. queue depth: kernels that were launched and have not started, over time; its mean is the sum of the
    latencies over the window (Little's law).
    """
    if on_cpu or not launches.known.any():
        reason = "operators run where they are called" if on_cpu else "the capture holds no launch of these kernels"
        return {"matched_count": 0, "unmatched_count": 0 if on_cpu else len(kernels), "reason": reason}
    start = kernels.start_ns[launches.known]
    called, returned = launches.start_ns[launches.known], launches.end_ns[launches.known]
    latency, wait = start - called, start - returned
    waiting = latency >= 0
    return {
        "matched_count": len(latency),
        "unmatched_count": int((~launches.known).sum()),
        "negative_latency_count": int((~waiting).sum()),
        "latency_sum_ns": int(latency.sum()),
        "latency_median_ns": float(np.median(latency)),
        "latency_p95_ns": float(np.percentile(latency, 95)),
        "latency_max_ns": int(latency.max()),
        "wait_median_ns": float(np.median(wait)),
        "wait_negative_count": int((wait < 0).sum()),
        "queue_depth_mean": float(latency[waiting].sum() / window_ns) if window_ns else None,
        "queue_depth_max": _deepest(called[waiting], start[waiting]),
    }


def _deepest(called: Array, started: Array) -> int:
    """Most kernels that were launched but not started at the same time."""
    if len(called) == 0:
        return 0
    called = np.sort(called)
    begun = np.searchsorted(np.sort(started), called, side="right")
    return int((np.arange(1, len(called) + 1) - begun).max())
