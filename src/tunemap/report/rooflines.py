"""What Nsight Compute measured of the kernels of an experiment's runs, kernels of one name and kind taken together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tunemap.files import read_json


@dataclass(frozen=True)
class Roofline:
    """The kernels of one captured run: short_name, category, launches, time_ns, bytes, flops; longest first.

    time_share: of these kernels in the time of all that were measured; the others have no bytes or no counted FLOPs.
    """

    run: str
    point: str
    kernels: pd.DataFrame
    time_share: float
    device_name: str | None
    bandwidth_bytes_per_s: float | None
    peak_flops_per_s: float | None


def read_rooflines(facts_dir: Path, labels: dict[str, str]) -> list[Roofline]:
    """Those of the runs of `labels` (run -> point) with a roofline in their facts, in that order."""
    return [
        _read(facts_dir / run, run, point)
        for run, point in labels.items()
        if (facts_dir / run / "roofline.csv").is_file()
    ]


def _read(folder: Path, run: str, point: str) -> Roofline:
    described, launches = read_json(folder / "roofline.json"), pd.read_csv(folder / "roofline.csv")
    known = launches.dropna(subset=["time_ns", "bytes", "flops"])
    known = known[(known["time_ns"] > 0) & (known["bytes"] > 0)]
    kernels = known.groupby(["short_name", "category"], sort=False, as_index=False).agg(
        launches=("id", "size"), time_ns=("time_ns", "sum"), bytes=("bytes", "sum"), flops=("flops", "sum")
    )
    total_ns = launches["time_ns"].sum()
    return Roofline(
        run=run,
        point=point,
        kernels=kernels.sort_values("time_ns", ascending=False, ignore_index=True),
        time_share=float(known["time_ns"].sum() / total_ns) if total_ns else 0.0,
        device_name=described["device_name"],
        bandwidth_bytes_per_s=described["bandwidth_bytes_per_s"],
        peak_flops_per_s=described["peak_flops_per_s"],
    )
