"""What the interactive trade-off map draws: the points of all experiments with their intervals, as plain values."""

from __future__ import annotations

from typing import Any

from tunemap.report.scene import MARKERS, Scene, failures

Row = dict[str, Any]
AXES = {  # key in the map's data: column of points.csv, factor, label, whether less is better
    "memory": ("peak_allocated_bytes", 2**-30, "peak memory, GiB", True),
    "throughput": ("tokens_per_second", 1.0, "throughput, real tokens/s", False),
    "accuracy": ("accuracy", 100.0, "accuracy, %", False),
    "energy": ("energy_per_10k_tokens_joules", 1.0, "energy, J per 10,000 tokens", True),
    "time": ("train_time_s", 1.0, "training time, s", True),
}


def map_data(scenes: list[Scene], cards: dict[str, dict[str, str]], main: str) -> dict[str, Any]:
    """Points, axes and methods for map.js; a value that does not exist is null, never zero.

    Points stand once per experiment. Memory is given in MiB where the study is so small that GiB would hide it.
    """
    peaks = [p["peak_allocated_bytes"] for s in scenes for p in s.trained if p["peak_allocated_bytes"] is not None]
    small = bool(peaks) and max(peaks) < 2 * 2**30
    points = [_point(scene, point, cards[scene.name], small) for scene in scenes for point in scene.trained]
    methods = dict.fromkeys(point["method"] for point in points)
    looks = {name: scene for scene in scenes for name in scene.colours}
    return {
        "main": main,
        "memory_unit": "MiB" if small else "GiB",
        "axes": {
            key: {
                "label": label.replace("GiB", "MiB") if small else label,
                "less": less,
                "known": any(point[key] is not None for point in points),
            }
            for key, (_, _, label, less) in AXES.items()
        },
        "methods": {
            name: {"colour": looks[name].colours[name], "marker": MARKERS.index(looks[name].markers[name])}
            for name in methods
        },
        "points": points,
    }


def _point(scene: Scene, point: Row, cards: dict[str, str], small: bool) -> Row:
    values = {}
    for key, (column, factor, _, _) in AXES.items():
        size = 2**-20 if key == "memory" and small else factor
        triple = [point[column], point[f"{column}_low"], point[f"{column}_high"]]
        known = triple[0] is not None
        values[key] = [None if value is None else float(f"{value * size:.6g}") for value in triple] if known else None
    return {
        "card": cards[point["point"]],
        "experiment": scene.name,
        "label": point["point"],
        "method": point["method"],
        "strategy": point["strategy"],
        "gpus": int(point["gpus"]),
        "device": point["device"] or "unknown device",
        "place": f"{point['model']} · {point['dataset']}",
        "front": point["front"],
        "probability": point["front_probability"],
        "seeds": int(point["seeds"]),
        "runs": int(point["runs"]),
        "failures": failures(point),
        "reason": point["reason"],
        **values,
    }
