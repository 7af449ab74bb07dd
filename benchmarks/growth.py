"""Draws how time and memory grow with runs, kernels and rows, from benchmarks/results: docs/images/growth.png.

python benchmarks/growth.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import seaborn as sns
from performance import RESULTS, read_results

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGE = REPOSITORY / "docs" / "images" / "growth.png"
STYLE = REPOSITORY / "src" / "tunemap" / "report" / "tunemap.mplstyle"
Line = tuple[str, list[float], list[float], list[float]]  # label, sizes, processor seconds, peak megabytes


def of_runs(results: Path) -> list[Line]:
    """Commands of a study as its runs become more; a study of one run is a base of comparison for all of them."""
    lines = []
    if scale := read_results(results, "scale-cpu"):
        for name, label in (("plan", "tunemap plan"), ("dry_run", "snakemake -n"), ("collect", "tables")):
            sizes = [one["collected_runs" if name == "collect" else "runs"] for one in scale["sizes"]]
            used = [one[name] for one in scale["sizes"]]
            lines.append((label, sizes, *_columns(used)))
    if report := read_results(results, "report-cpu"):
        sizes = [one["runs"] for one in report["sizes"]]
        parts = [(one["page_s"] + one["database_s"], one["peak_bytes"] / 1e6) for one in report["sizes"]]
        lines.append(("page and database", sizes, [part[0] for part in parts], [part[1] for part in parts]))
    if executed := read_results(results, "executed-cpu"):
        sizes = [one["runs"] for one in executed["sizes"]]
        lines.append(("whole workflow, stub runs", sizes, *_columns([one["execute"] for one in executed["sizes"]])))
    return lines


def of_kernels(results: Path) -> list[Line]:
    """Reading of a profile."""
    found = read_results(results, "extraction-cpu")
    sizes = found["sizes"] if found else []
    kernels = [float(one["kernels"]) for one in sizes]
    return [("tunemap facts", kernels, *_columns(sizes))] if sizes else []


def of_rows(results: Path) -> list[Line]:
    """Tokenisation."""
    found = read_results(results, "tokenisation-cpu")
    sizes = found["sizes"] if found else []
    rows = [float(one["rows"]) for one in sizes]
    ways = (("tunemap", "tokenize_dataset"), ("datasets", "datasets: load, map, save"))
    return [(label, rows, *_columns([one[way] for one in sizes])) for way, label in ways] if sizes else []


def _columns(used: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [one["processor_s"] for one in used], [one["peak_bytes"] / 1e6 for one in used]


def draw(results: Path = RESULTS) -> plt.Figure:
    """Two rows of panels, time above memory, one column for each thing that grows."""
    every = (("runs", of_runs(results)), ("kernels", of_kernels(results)), ("rows of a dataset", of_rows(results)))
    columns = [(thing, lines) for thing, lines in every if lines]
    with mpl.style.context(str(STYLE)):
        figure, panels = plt.subplots(2, len(columns), figsize=(11, 6), sharex="col", layout="constrained")
        for (thing, lines), (above, below) in zip(columns, panels.T, strict=True):
            for (label, sizes, seconds, megabytes), colour in zip(lines, sns.color_palette("colorblind"), strict=False):
                above.plot(sizes, seconds, marker="o", color=colour, label=label)
                below.plot(sizes, megabytes, marker="o", color=colour)
            _, sizes, seconds, _ = lines[0]
            # The slope of linear growth, through the first line's last point.
            linear = [seconds[-1] * size / sizes[-1] for size in (sizes[0], sizes[-1])]
            above.plot((sizes[0], sizes[-1]), linear, ":", color="0.5", label="linear growth")
            for panel in (above, below):
                panel.set(xscale="log", yscale="log")
            above.set_title(f"Growth with {thing}")
            below.set_xlabel(thing)
            if len(lines) > 2:  # room for the names above the lines
                above.set_ylim(top=300 * above.get_ylim()[1])
            above.legend(fontsize="small")
        panels[0, 0].set_ylabel("processor seconds")
        panels[1, 0].set_ylabel("peak memory in MB")
    return figure


def main() -> None:
    """Draw and save."""
    IMAGE.parent.mkdir(exist_ok=True)
    draw().savefig(IMAGE)
    print(IMAGE)


if __name__ == "__main__":
    main()
