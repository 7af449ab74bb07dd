"""Predicted against measured peak memory of every collected run, as a drawing of the page."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from markupsafe import Markup, escape

SIDE, MARGIN = 420, 58  # of the square in user units, and left of and below it
NEAR = 0.10  # the band
Place = Callable[[float], float]  # bytes to user units


def calibration_plot(path: Path, study: str) -> Markup | None:
    """Both peaks on logarithmic axes with a band of 10 %, from the record in `path`; None where no run has both.

    The runs of `study` are filled, those of others are rings.
    """
    points = list(_points(path)) if path.is_file() else []
    if not points:
        return None
    low = min(min(measured, predicted) for _, _, measured, predicted in points) / 1.3
    high = max(max(measured, predicted) for _, _, measured, predicted in points) * 1.3

    def place(size: float) -> float:
        return SIDE * math.log(size / low) / math.log(high / low)

    body = [*_axes(low, high, place), *_band(low, high, place)]
    for owner, run, measured, predicted in points:
        name = run if owner == study else f"{run} of {owner}"  # studies share ids of runs
        title = escape(f"{name}: predicted {_words(predicted)}, measured {_words(measured)}")
        fill = "currentColor" if owner == study else "none"
        body.append(
            f'<circle cx="{place(measured):.1f}" cy="{SIDE - place(predicted):.1f}" r="4" fill="{fill}" '
            f'fill-opacity=".55" stroke="currentColor"><title>{title}</title></circle>'
        )
    alt = f"Predicted against measured peak memory of {len(points)} runs on logarithmic axes, with a band of {NEAR:.0%}"
    box = f"{-MARGIN} -8 {SIDE + MARGIN + 20} {SIDE + MARGIN}"
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" aria-label="{alt}" font-size="12">'
        f"{''.join(body)}</svg>"
    )


def _points(path: Path) -> Iterator[tuple[str, str, float, float]]:
    """(study, run, measured, predicted) of each run that has both peaks."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["measured_peak_bytes"] and row["predicted_peak_bytes"]:
                yield row["study"], row["run"], float(row["measured_peak_bytes"]), float(row["predicted_peak_bytes"])


def _axes(low: float, high: float, place: Place) -> Iterator[str]:
    yield f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="var(--line)"/>'
    for tick in _ticks(low, high):
        at = place(tick)
        yield f'<path d="M{at:.1f} 0V{SIDE}M0 {SIDE - at:.1f}H{SIDE}" stroke="var(--line)"/>'
        yield (
            f'<text x="{at:.1f}" y="{SIDE + 16}" text-anchor="middle" fill="currentColor">{_words(tick)}</text>'
            f'<text x="-6" y="{SIDE - at + 4:.1f}" text-anchor="end" fill="currentColor">{_words(tick)}</text>'
        )
    yield (
        f'<text x="{SIDE / 2}" y="{SIDE + 38}" text-anchor="middle" fill="currentColor">measured</text>'
        '<text x="6" y="14" fill="currentColor">predicted</text>'
    )


def _band(low: float, high: float, place: Place) -> Iterator[str]:
    shift = place(low * (1 + NEAR))
    for offset, dash in ((0, ""), (shift, ' stroke-dasharray="4 4"'), (-shift, ' stroke-dasharray="4 4"')):
        start, end = max(0.0, -offset), min(float(SIDE), SIDE - offset)
        yield (
            f'<path d="M{start:.1f} {SIDE - start - offset:.1f}L{end:.1f} {SIDE - end - offset:.1f}" '
            f'stroke="currentColor" fill="none" opacity=".6"{dash}/>'
        )


def _ticks(low: float, high: float) -> list[float]:
    """Powers of two between the ends, seven or so at most."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    step = max(1, round((last - first) / 6))
    return [2.0**power for power in range(first, last + 1, step) if low <= 2.0**power <= high]


def _words(size: float) -> str:
    if size >= 1 << 30:
        return f"{size / 2**30:.3g} GiB"
    return f"{size / 2**20:.3g} MiB" if size >= 1 << 20 else f"{size / 2**10:.3g} KiB"
