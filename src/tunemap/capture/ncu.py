"""A capture by Nsight Compute: bytes and FLOPs of every kernel of a step, for roofline points; of one process alone.

ncu runs each kernel several times and one after the other, so that its times say nothing about a step, and a kernel
that waits for another rank would wait for ever: runs on several GPUs are not captured, and kernels of NCCL are left
out besides. Counters need a permission that many clusters do not give (NVreg_RestrictProfilingToAdminUsers). Whether a
capture worked is told by the report that it left.

Documentation: https://docs.nvidia.com/nsight-compute/NsightComputeCli/index.html
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunemap.files import write_atomic
from tunemap.trace.counters import METRICS, tensor_counters

REPORT = "ncu"
KERNELS = "kernels.csv"  # the raw page, without the names of host and process
LEFT_OUT = ("Process ID", "Process Name", "Host Name")
MOST_KERNELS = 4000  # of the window; each is run again for every few counters
QUERY_LIMIT_S = 120.0
IMPORT_LIMIT_S = 600.0


class NcuError(Exception):
    """ncu is not there, may not read counters, or left no report."""


@dataclass(frozen=True)
class Ncu:
    """An installed ncu, with the counters that it has for the GPU here."""

    executable: str
    version: str
    metrics: tuple[str, ...]
    dropped: tuple[str, ...]  # counters that it does not know

    @property
    def described(self) -> dict[str, object]:
        """What capture.json says of it."""
        return {"ncu_version": self.version, "ncu_metrics_dropped": list(self.dropped)}

    def around(self, command: Sequence[str], folder: Path) -> list[str]:
        """`command`, one process, under ncu."""
        return [
            self.executable,
            "--target-processes=all",
            "--profile-from-start=off",  # the process says when, see `tunemap.capture.worker`
            "--kernel-name=regex:^(?!nccl)",
            f"--launch-count={MOST_KERNELS}",
            "--clock-control=none",  # fixed clocks would be those of another machine than the one that was timed
            f"--metrics={','.join(self.metrics)}",
            "--force-overwrite",
            f"--export={folder / REPORT}",
            *command,
        ]

    def export(self, folder: Path) -> list[Path]:
        """The raw page of the report in `folder`, which is removed: it holds the environment of the process."""
        report = folder / f"{REPORT}.ncu-rep"
        if not report.exists():
            raise NcuError(
                "ncu left no report: it may not be allowed to read counters (ERR_NVGPUCTRPERM; the log says so), "
                "and no kernel may have run"
            )
        command = [self.executable, f"--import={report}", "--csv", "--page=raw", "--print-units=base"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=IMPORT_LIMIT_S)
        lines = done.stdout.splitlines()
        header = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
        if header is None:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise NcuError(f"ncu printed no kernels of its report: {last[0]}")
        write_atomic(folder / KERNELS, _without_names(lines[header:]))
        report.unlink()
        return [folder / KERNELS]


def _without_names(lines: list[str]) -> str:
    rows = list(csv.reader(lines))
    kept = [index for index, name in enumerate(rows[0]) if name not in LEFT_OUT]
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([row[index] for index in kept] for row in rows if len(row) == len(rows[0]))
    return text.getvalue()


def probe() -> Ncu:
    """The ncu on the PATH and the counters that it has for this machine's GPU. Raises NcuError without."""
    executable = shutil.which("ncu")
    if executable is None:
        raise NcuError("a roofline needs Nsight Compute, and there is no ncu on the PATH")
    version = next((line for line in _output(executable, "--version").splitlines() if "ersion" in line), "unknown")
    # A name a line, then what it counts; the names of counters want an ending such as .sum.
    listed = {words[0] for line in _output(executable, "--query-metrics").splitlines() if (words := line.split())}
    known = [name for name in METRICS if name.partition(".")[0] in listed]
    if not known:
        raise NcuError("ncu knows no counters here: is there a GPU, of a kind that it supports?")
    return Ncu(
        executable=executable,
        version=version.strip(),
        metrics=(*known, *tensor_counters(f"{name}.sum" for name in listed)),
        dropped=tuple(name for name in METRICS if name not in known),
    )


def _output(executable: str, *words: str) -> str:
    done = subprocess.run(
        [executable, *words], capture_output=True, text=True, errors="replace", timeout=QUERY_LIMIT_S, check=False
    )
    return f"{done.stdout}\n{done.stderr}"
