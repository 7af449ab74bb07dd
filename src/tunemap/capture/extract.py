"""From the traces of a capture to facts on disk: summary.json, one csv per table (`tunemap.trace.facts`), one step.

The step is timeline.csv (`tunemap.trace.timeline`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tunemap.capture.ncu import KERNELS
from tunemap.errors import UserError
from tunemap.files import SEAL, damaged, read_sealed
from tunemap.hardware import hardware_of_device
from tunemap.measure.datasheet import MATMUL_DTYPES
from tunemap.trace.command import SUMMARY, read_traces, write_json, write_tables
from tunemap.trace.facts import compute_facts
from tunemap.trace.ncu import read_ncu
from tunemap.trace.timeline import step_timeline


def extract(capture: Path, folder: Path, *, roofline: Path | None = None) -> None:
    """Write the facts of a capture; of one that failed or was skipped, capture.json with its reason is all there is.

    `roofline`, a capture of single kernels, becomes roofline.csv (`tunemap.trace.ncu`) and roofline.json, which says
    how that capture ended and what the device can do at most.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    described = _described(capture)
    write_json(folder / "capture.json", described)
    if roofline is not None:
        _extract_roofline(roofline, folder)
    if described["outcome"] != "ok":
        print(f"no facts: {described['reason']}", flush=True)
        return
    traces = sorted([*capture.glob("trace.*.json.gz"), *capture.glob("trace.*.sqlite")])
    if not traces:
        raise damaged(capture, f"{capture}: trace.rank0.json.gz and all others are gone")
    trace = read_traces(traces)
    facts = compute_facts(trace)
    write_tables(folder, facts.tables | {"timeline": step_timeline(trace)}, "csv")
    write_json(folder / SUMMARY, facts.summary)


def _described(capture: Path) -> dict[str, Any]:
    """How a capture ended; one whose capture.json is not as it was written is set aside."""
    try:
        return read_sealed(capture / "capture.json")
    except UserError as error:
        raise damaged(capture, str(error).partition(";")[0]) from None


def _extract_roofline(roofline: Path, folder: Path) -> None:
    described = _described(roofline)
    said = {key: value for key, value in described.items() if key != SEAL}  # it is of the capture's own words alone
    write_json(folder / "roofline.json", said | _roof(described))
    if described["outcome"] == "ok":
        write_tables(folder, {"roofline": read_ncu([roofline / KERNELS])}, "csv")
    else:
        print(f"no roofline: {described['reason']}", flush=True)


def _roof(described: dict[str, Any]) -> dict[str, float | None]:
    """What the GPU of a capture can do at most by its data sheet: bytes and matrix-product FLOPs per second."""
    hardware = hardware_of_device(str(described.get("device_name")))
    return {
        "bandwidth_bytes_per_s": hardware.bandwidth_bytes_per_s if hardware else None,
        "peak_flops_per_s": hardware.peak(MATMUL_DTYPES[described["precision"]]) if hardware else None,
    }
