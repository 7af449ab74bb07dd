"""What a GPU is measured by, in the minutes that it is there for: ceiling, step, settings, race, and the page of them.

    python benchmarks/gpu.py                 # nine minutes; make gpu-bench
    python benchmarks/gpu.py --minutes 60    # all rounds, and the race at two sizes

Needs no network: peers race that `make peers-install` has installed before, beside us and the Trainer. What matters
first comes first, LoRA before full fine-tuning, small models before large ones, one round of all before the next. Each
benchmark writes its results to benchmarks/results as it goes, begins nothing that would not be done in its share of the
minutes, and is stopped at their end; one that fails does not keep the others from running. The race leaves out the
model of 7 billion parameters, whose weights a CPU draws for minutes while the GPU waits: peers.py --sizes qwen2.5-7b.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from race import one_gpu

from tunemap.training.devices import visible_gpu_count

HERE = Path(__file__).resolve().parent
SIZES = ("qwen2.5-0.5b", "qwen2.5-1.5b")
KEPT_S = 15.0  # of the minutes, for the page
GRACE_S = 20.0  # between asking a benchmark to end and ending it


@dataclass(frozen=True)
class Step:
    """A command. `share` of the minutes: when it begins nothing new any more; a short one has none."""

    name: str
    command: tuple[str | Path, ...]
    share: float | None = None


def steps_of(results: Path, device: str = "cuda") -> list[Step]:
    """Everything that is measured, in its order."""

    def benchmark(script: str, name: str) -> tuple[str | Path, ...]:
        output = results / f"{name}-{device}.json"
        return sys.executable, HERE / script, "--device", device, "--methods", "lora", "full", "--output", output

    return [
        Step("ceiling", (sys.executable, "-m", "tunemap.cli", "ceiling", "--device", device)),
        Step("lean-step", benchmark("lean_step.py", "lean-step")),
        Step("waterfall", benchmark("waterfall.py", "waterfall"), share=0.5),
        Step("peers", (*benchmark("peers.py", "peers"), "--sizes", *SIZES), share=0.95),
    ]


def take(steps: list[Step], minutes: float) -> list[str]:
    """Take each step to its end, or to that of the minutes; the names of those that did not end well."""
    began, failed = time.monotonic(), []
    for step in steps:
        passed_s = time.monotonic() - began
        limit = [] if step.share is None else ["--minutes", f"{max(0.0, minutes * step.share - passed_s / 60):.2f}"]
        print(f"\n{step.name}, after {passed_s:.0f} s", flush=True)
        if not _ends_well([*step.command, *limit], limit_s=60 * minutes - KEPT_S - passed_s):
            failed.append(step.name)
    return failed


def _ends_well(command: list[str | Path], limit_s: float) -> bool:
    process = subprocess.Popen(command, cwd=HERE.parent)
    try:
        return process.wait(max(0.0, limit_s)) == 0
    except subprocess.TimeoutExpired:
        print("stopped: the minutes are over", flush=True)
        process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return False


def main() -> None:
    """Measure, and write the page of what there is then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: %(default)s)")
    arguments = parser.parse_args()
    if not visible_gpu_count():
        sys.exit("the NVIDIA driver shows no GPU here")
    os.environ.update(one_gpu(os.environ))  # so that results name the GPU that made them, and no other
    failed = take(steps_of(HERE / "results"), arguments.minutes)
    subprocess.run([sys.executable, HERE / "performance.py"], check=True)
    if failed:
        sys.exit(f"did not end well: {', '.join(failed)}")


if __name__ == "__main__":
    main()
