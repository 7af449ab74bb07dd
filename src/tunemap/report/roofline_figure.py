"""The roofline of each run whose kernels Nsight Compute measured: FLOPs per byte against FLOP/s, and what limits them.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures",
Communications of the ACM 52(4), 2009, https://doi.org/10.1145/1498765.1498785.
"""

from __future__ import annotations

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tunemap.report.rooflines import Roofline
from tunemap.report.scene import AXIS, INK, WIDTH, Scene

MOST_NAMES = 3  # of the longest kernels of a panel
LONGEST_NAME = 48
MOST_CATEGORIES = 8
LARGEST = 260.0  # points²: the area of a kernel that took all of the time


def draw_roofline(scene: Scene) -> tuple[Figure, str, str] | None:
    """A panel per run: a disc per kernel, its area the share of the time, below the roof of the device's data sheet."""
    rooflines = [one for one in scene.rooflines if len(one.kernels)]
    if not rooflines:
        return None
    times: dict[str, float] = {}
    for one in rooflines:
        for category, time_ns in one.kernels.groupby("category")["time_ns"].sum().items():
            times[str(category)] = times.get(str(category), 0.0) + float(time_ns)
    named = sorted(times, key=lambda name: -times[name])[:MOST_CATEGORIES]
    colours = dict(zip(named, sns.color_palette("colorblind", len(named)).as_hex(), strict=True))
    figure = Figure(figsize=(WIDTH, 0.7 + 2.9 * len(rooflines)), layout="constrained")
    panels = figure.subplots(len(rooflines), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, one in zip(panels, rooflines, strict=True):
        _draw(axes, one, colours)
    panels[-1].set_xlabel("FLOPs per byte of device memory")
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, markersize=8) for colour in colours.values()]
    texts = list(colours)
    if len(times) > len(named):
        handles.append(Line2D([], [], marker="o", linestyle="", color=AXIS, markersize=8))
        texts.append("other categories")
    figure.legend(handles, texts, loc="outside lower center", ncols=5)
    words = " ".join(_words(one) for one in rooflines)
    caption = (
        "Kernels of one step under Nsight Compute, which runs them one by one: launches of one name are summed, the "
        f"area of a disc is its share of the time. The line is the data sheet's bandwidth and peak. {words}"
    )
    return figure, caption, f"FLOPs per byte against FLOP/s of kernels. {words}"


def _draw(axes: Axes, one: Roofline, colours: dict[str, str]) -> None:
    kernels = one.kernels
    intensity, speed = kernels["flops"] / kernels["bytes"], kernels["flops"] / kernels["time_ns"] * 1e9
    shares = kernels["time_ns"] / kernels["time_ns"].sum()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.scatter(
        intensity,
        speed,
        s=np.maximum(LARGEST * shares, 6.0),
        c=[colours.get(category, AXIS) for category in kernels["category"]],
        alpha=0.8,
        linewidth=0,
        zorder=3,
    )
    names = [str(name)[:LONGEST_NAME] for name in kernels["short_name"][:MOST_NAMES]]
    for row in range(len(names)):
        place = (intensity[row], speed[row])
        axes.annotate(str(row + 1), place, xytext=(6, 4), textcoords="offset points", fontsize=7, color=INK)
    listed = "\n".join(f"{row}  {name}" for row, name in enumerate(names, start=1))
    axes.text(0.985, 0.04, listed, transform=axes.transAxes, ha="right", va="bottom", fontsize=7, color=INK)
    roof = _roof(one, float(intensity.min()), float(intensity.max()))
    if roof is not None:
        axes.plot(*roof, "-", color=AXIS, linewidth=1.2, zorder=2)
    axes.set_ylabel("FLOP/s")
    axes.set_title(one.point, loc="left", fontsize=9)


def _roof(one: Roofline, lowest: float, highest: float) -> tuple[list[float], list[float]] | None:
    """Corners of the attainable FLOP/s over FLOPs per byte; None where the device is not described."""
    if one.bandwidth_bytes_per_s is None or one.peak_flops_per_s is None:
        return None
    ridge = one.peak_flops_per_s / one.bandwidth_bytes_per_s
    at = [min(lowest, ridge) / 2, ridge, max(highest, ridge) * 2]
    return at, [min(one.peak_flops_per_s, value * one.bandwidth_bytes_per_s) for value in at]


def _words(one: Roofline) -> str:
    """`lora: 12 kernels; longest gemm_a (gemm) 41% of the time, 120 FLOPs/byte, 310 TFLOP/s.`"""
    first = one.kernels.iloc[0]
    share = first["time_ns"] / one.kernels["time_ns"].sum()
    names = f"{len(one.kernels)} kernel{'s' if len(one.kernels) > 1 else ''}"
    said = (
        f"{one.point}: {names} with {one.time_share:.0%} of the measured time (the others count no "
        f"FLOPs); longest {first['short_name']} ({first['category']}), {share:.0%} of that, "
        f"{first['flops'] / first['bytes']:.3g} FLOPs per byte, {first['flops'] / first['time_ns'] / 1e3:.3g} TFLOP/s"
    )
    if one.bandwidth_bytes_per_s is None or one.peak_flops_per_s is None:
        return f"{said}; no data sheet of {one.device_name or 'the device'} here, so no roof."
    ridge = one.peak_flops_per_s / one.bandwidth_bytes_per_s
    below = one.kernels[one.kernels["flops"] / one.kernels["bytes"] < ridge]["time_ns"].sum()
    return f"{said}; {below / one.kernels['time_ns'].sum():.0%} of that time left of the ridge, bound by memory."
