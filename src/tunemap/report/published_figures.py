"""The figures of three published studies, drawn from the results in one style, honest where the originals mislead.

Bars start at zero; an axis that does not is marked as zoomed. Intervals are drawn where there are any. What needs a
capture is drawn only where runs were captured.

Left out on purpose: accuracy per parameter (it rewards small heads), a single sampled kernel as the utilisation of a
method, tables as pictures, and photographs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tunemap.report.published_tables import MIB, Source, is_on, ranks_of, single_device_methods
from tunemap.report.scene import BASE_COLOUR, INK, METHOD_COLOURS, PAPER, WIDTH, Row

STRATEGY_COLOURS = {"ddp": METHOD_COLOURS[0], "fsdp": METHOD_COLOURS[1], "hybrid": METHOD_COLOURS[2]}
COLLECTIVE_COLOURS = (*METHOD_COLOURS[3:7], BASE_COLOUR)
FIGURES = {  # their names by study
    "nyu": (
        "nyu-strategies",
        "nyu-peft-memory",
        "nyu-dumbbell",
        "nyu-improvement",
        "nyu-memory-stress",
        "nyu-time-to-accuracy",
        "nyu-methods",
        "nyu-loss",
        "nyu-throughput-by-step",
        "nyu-collectives",
        "nyu-copies",
    ),
    "columbia": (
        "columbia-accuracy",
        "columbia-memory",
        "columbia-parameters",
        "columbia-lora",
        "columbia-qlora",
        "columbia-accuracy-memory",
    ),
    "rtx": ("rtx-metrics",),
}
Drawn = tuple[Figure, str, str] | None  # figure, caption, alternative text
Value = tuple[float, float, float] | None  # a mean and the ends of its interval, which are the mean where there is none


def published_figures(
    study: str, source: Source, losses: pd.DataFrame, facts_dir: Path
) -> Iterator[tuple[str, str, Figure, str, str]]:
    """Name, title, figure, caption and alternative text of each figure that has something to show."""
    captured = _Captures(source, facts_dir)
    makers: dict[str, dict[str, tuple[str, Callable[[], Drawn]]]] = {
        "nyu": {
            "nyu-strategies": ("DDP against FSDP", lambda: _strategies(source)),
            "nyu-peft-memory": ("Memory of full fine-tuning and PEFT by strategy", lambda: _regime_memory(source)),
            "nyu-dumbbell": ("From DDP to FSDP", lambda: _dumbbell(source)),
            "nyu-improvement": ("Improvement of FSDP over DDP", lambda: _improvement(source)),
            "nyu-memory-stress": ("Memory over length", lambda: _memory_stress(source)),
            "nyu-time-to-accuracy": ("Time to accuracy", lambda: _time_to_accuracy(source)),
            "nyu-methods": ("Memory, step time and accuracy by method", lambda: _methods(source)),
            "nyu-loss": ("LoRA against GoRA: loss", lambda: _loss(source, losses)),
            "nyu-throughput-by-step": ("LoRA against GoRA: speed by step", lambda: _speed_by_step(source, losses)),
            "nyu-collectives": ("Time of collectives", captured.collectives),
            "nyu-copies": ("Copies over time", captured.copies),
        },
        "columbia": {
            "columbia-accuracy": ("Accuracy by method and rank", lambda: _rank_bars(source, "accuracy", 100, "%")),
            "columbia-memory": (
                "Peak memory by method and rank",
                lambda: _rank_bars(source, "peak_allocated_bytes", MIB, "MiB"),
            ),
            "columbia-parameters": ("Trainable parameters", lambda: _parameters(source)),
            "columbia-lora": ("LoRA by rank", lambda: _four_by_rank(source, "lora")),
            "columbia-qlora": ("QLoRA by rank", lambda: _four_by_rank(source, "qlora")),
            "columbia-accuracy-memory": ("Accuracy against memory", lambda: _scatter(source)),
        },
        "rtx": {"rtx-metrics": ("Throughput, time and memory", lambda: _rtx(source))},
    }
    for name, (title, draw) in makers[study].items():
        drawn = draw()
        if drawn is not None:
            yield (name, title, *drawn)


# --- parts ------------------------------------------------------------------------------------------------


def _value(point: Row | None, column: str, factor: float = 1.0) -> Value:
    if point is None or point.get(column) is None:
        return None
    ends = (point.get(f"{column}_low"), point.get(f"{column}_high"))
    mean, low, high = (float(point[column] if one is None else one) * factor for one in (point[column], *ends))
    return mean, low, high


def _figure(columns: int, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def _bars(
    axes: Axes, groups: list[str], series: dict[str, list[Value]], colours: list[str], unit: str, *, digits: int = 0
) -> None:
    """Grouped bars from zero with intervals and the value above each."""
    width = 0.8 / max(1, len(series))
    for index, (name, values) in enumerate(series.items()):
        for group, value in enumerate(values):
            if value is None:
                continue
            place = group + (index - (len(series) - 1) / 2) * width
            axes.bar(
                place, value[0], width * 0.94, color=colours[index], label=name if group == 0 else None, linewidth=0
            )
            if value[1] != value[2]:
                axes.plot([place, place], [value[1], value[2]], color=INK, linewidth=1.2)
            axes.annotate(
                f"{value[0]:,.{digits}f}", (place, value[0]), xytext=(0, 2), textcoords="offset points", ha="center",
                fontsize=6.5,
            )  # fmt: skip
    axes.set_xticks(range(len(groups)), groups, fontsize=7)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.14)
    axes.grid(axis="x", visible=False)


def _alt(title: str, groups: list[str], series: dict[str, list[Value]], digits: int = 1) -> str:
    said = [
        f"{name}, {group}: {value[0]:,.{digits}f}"
        for name, values in series.items()
        for group, value in zip(groups, values, strict=True)
        if value is not None
    ]
    return f"{title}. {'; '.join(said)}."


def _any(series: dict[str, list[Value]]) -> bool:
    return any(value is not None for values in series.values() for value in values)


def _spread(source: Source) -> list[Row]:
    return [point for point in source.points if point["strategy"] in STRATEGY_COLOURS and point["seeds"]]


def _at(points: list[Row], kind: str, strategy: str, gpus: int) -> Row | None:
    return next(
        (one for one in points if (one["method_kind"], one["strategy"], int(one["gpus"])) == (kind, strategy, gpus)),
        None,
    )


# --- NYU --------------------------------------------------------------------------------------------------


def _strategies(source: Source) -> Drawn:
    points = _spread(source)
    gpus = sorted({int(point["gpus"]) for point in points})
    used = [one for one in STRATEGY_COLOURS if any(point["strategy"] == one for point in points)]
    if not gpus:
        return None
    peak = {
        one.upper(): [_value(_at(points, "full", one, n), "peak_allocated_bytes", MIB) for n in gpus] for one in used
    }
    time = {one.upper(): [_value(_at(points, "full", one, n), "step_time_median_s", 1e3) for n in gpus] for one in used}
    if not _any(peak):
        return None
    figure, (left, right) = _figure(2)
    groups, colours = [f"{n} device{'s' if n > 1 else ''}" for n in gpus], [STRATEGY_COLOURS[one] for one in used]
    _bars(left, groups, peak, colours, "peak allocated, MiB", digits=1)
    _bars(right, groups, time, colours, "median step, ms", digits=1)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(used))
    caption = (
        "Full fine-tuning: peak memory of the largest rank and time of a step. One device is wrapped like the others, "
        "so that its bars may differ; in the publication both were one unwrapped run."
    )
    return figure, caption, _alt("Peak memory in MiB", groups, peak)


def _regime_memory(source: Source) -> Drawn:
    points = _spread(source)
    gpus = sorted({int(point["gpus"]) for point in points})
    series: dict[str, list[Value]] = {}
    colours = []
    for kind, word, colour in (("full", "full", 0), ("lora", "PEFT", 2)):
        for index, strategy in enumerate(("ddp", "fsdp")):
            values = [_value(_at(points, kind, strategy, n), "peak_allocated_bytes", MIB) for n in gpus]
            if any(values):
                series[f"{strategy.upper()} {word}"] = values
                colours.append(METHOD_COLOURS[colour + index])
    if not _any(series):
        return None
    figure, (axes,) = _figure(1)
    groups = [f"{n} device{'s' if n > 1 else ''}" for n in gpus]
    _bars(axes, groups, series, colours, "peak allocated, MiB", digits=1)
    figure.legend(loc="outside upper center", ncols=len(series))
    return figure, "Peak memory of the largest rank.", _alt("Peak memory in MiB", groups, series)


def _pairs(source: Source) -> list[tuple[str, Row, Row]]:
    """Points of DDP and FSDP that differ in nothing else of interest."""
    points = _spread(source)
    found = []
    for kind, word in (("full", "full"), ("lora", "PEFT")):
        for gpus in sorted({int(point["gpus"]) for point in points}):
            ddp, fsdp = _at(points, kind, "ddp", gpus), _at(points, kind, "fsdp", gpus)
            if ddp is not None and fsdp is not None:
                found.append((f"{word}, {gpus}", ddp, fsdp))
    return found


def _dumbbell(source: Source) -> Drawn:
    pairs = _pairs(source)
    if not pairs:
        return None
    figure, panels = _figure(2, 1.2 + 0.3 * len(pairs))
    for axes, column, factor, unit in (
        (panels[0], "peak_allocated_bytes", MIB, "peak allocated, MiB"),
        (panels[1], "tokens_per_second", 1.0, "tokens/s"),
    ):
        for row, (_, ddp, fsdp) in enumerate(pairs):
            ends = [float(one[column]) * factor for one in (ddp, fsdp) if one[column] is not None]
            if len(ends) < 2:
                continue
            axes.plot(ends, [row, row], color=BASE_COLOUR, linewidth=1.5, zorder=1)
            for end, strategy in zip(ends, ("ddp", "fsdp"), strict=True):
                label = strategy.upper() if row == 0 else None
                axes.plot([end], [row], "o", color=STRATEGY_COLOURS[strategy], markeredgecolor=PAPER, label=label)
        axes.set_yticks(range(len(pairs)), [name for name, *_ in pairs])
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(unit)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    alt = "; ".join(
        f"{name}: {a['peak_allocated_bytes']} and {b['peak_allocated_bytes']} bytes" for name, a, b in pairs
    )
    return figure, "Peak memory and throughput under DDP and FSDP, by regime and number of devices.", f"{alt}."


def _certain(value: float) -> Value:
    return value, value, value


def _improvement(source: Source) -> Drawn:
    pairs = _pairs(source)
    if not pairs:
        return None
    groups = [name for name, *_ in pairs]
    series: dict[str, list[Value]] = {}
    for title, column in (("peak memory", "peak_allocated_bytes"), ("step time", "step_time_median_s")):
        series[title] = [
            _certain(100 * (a[column] - b[column]) / a[column]) if a[column] and b[column] else None
            for _, a, b in pairs
        ]
    if not _any(series):
        return None
    figure, (axes,) = _figure(1)
    _bars(axes, groups, series, list(METHOD_COLOURS[:2]), "improvement, %", digits=1)
    axes.set_ylim(auto=True)
    axes.axhline(0, color=INK, linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=2)
    caption = "100 × (DDP − FSDP) / DDP: below zero FSDP takes more. Intervals are those of the comparisons' table."
    return figure, caption, _alt("Improvement of FSDP in percent", groups, series)


def _lines(groups: dict[str, list[tuple[float, float]]], x: str, y: str) -> tuple[Figure, Axes]:
    figure, (axes,) = _figure(1)
    for index, (name, line) in enumerate(groups.items()):
        line = sorted(line)
        colour = METHOD_COLOURS[index % len(METHOD_COLOURS)]
        axes.plot([a for a, _ in line], [b for _, b in line], "o-", color=colour, label=name, markersize=4)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=min(4, max(1, len(groups))))
    return figure, axes


def _memory_stress(source: Source) -> Drawn:
    groups: dict[str, list[tuple[float, float]]] = {}
    for name in {point["experiment"] for point in source.points}:
        points = [one for one in source.points if one["experiment"] == name and one["peak_allocated_bytes"]]
        if len({one["max_length"] for one in points}) < 2:
            continue
        for one in points:
            label = f"{one['method']} {one['strategy']}, {str(one['batching']).replace('_', ' ')}"
            groups.setdefault(label, []).append((float(one["max_length"]), float(one["peak_allocated_bytes"]) * MIB))
    if not groups:
        return None
    figure, _ = _lines(dict(sorted(groups.items())), "max_length, tokens", "peak allocated, MiB")
    caption = (
        "Peak memory over the maximum length. Rows of fixed length reach it; padding to the longest of a batch does "
        "not, so that a flat line says nothing about memory."
    )
    alt = "; ".join(f"{name}: {', '.join(f'{a:g}: {b:.1f}' for a, b in sorted(line))}" for name, line in groups.items())
    return figure, caption, f"Peak memory in MiB by length. {alt}."


def _time_to_accuracy(source: Source) -> Drawn:
    groups: dict[str, list[tuple[float, float]]] = {}
    for name in {point["experiment"] for point in source.points}:
        points = [one for one in source.points if one["experiment"] == name and one["accuracy"] is not None]
        if len({str(one["max_steps"]) for one in points}) < 2:
            continue
        for one in points:
            if one["train_time_s"] is not None:
                label = f"{one['method']} {one['strategy']}"
                groups.setdefault(label, []).append((float(one["train_time_s"]), 100 * float(one["accuracy"])))
    if not groups:
        return None
    figure, _ = _lines(dict(sorted(groups.items())), "training time, s", "accuracy, %")
    caption = "Each dot is a run of its own length, evaluated after its end: no evaluation is inside a clock."
    alt = "; ".join(f"{name}: {', '.join(f'{a:.1f} s {b:.1f} %' for a, b in sorted(g))}" for name, g in groups.items())
    return figure, caption, f"Accuracy over training time. {alt}."


def _methods(source: Source) -> Drawn:
    rows = {name: point for name, point in single_device_methods(source).items() if point is not None}
    if not rows:
        return None
    figure, panels = _figure(3, 3.2)
    said: dict[str, list[Value]] = {}
    for axes, column, factor, unit, digits in (
        (panels[0], "peak_allocated_bytes", MIB, "peak allocated, MiB", 1),
        (panels[1], "step_time_median_s", 1e3, "median step, ms", 1),
        (panels[2], "accuracy", 100.0, "accuracy, %", 1),
    ):
        values = [_value(point, column, factor) for point in rows.values()]
        said[unit] = values
        _bars(axes, list(rows), {unit: values}, [METHOD_COLOURS[0]], unit, digits=digits)
        axes.tick_params(axis="x", rotation=60)
    if not _any(said):
        return None
    return (
        figure,
        "Each measure on an axis of its own, from zero, with 95 % intervals.",
        _alt("Methods", list(rows), said),
    )


def _curves(source: Source, losses: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Loss curves of LoRA and GoRA on one device, of the first run of each that ended ok."""
    rows = single_device_methods(source)
    found = {}
    for name in ("LoRA", "GoRA"):
        point = rows[name]
        runs = source.ok_runs_of(point) if point is not None else []
        if not runs:
            continue
        curve = losses[losses["run"] == runs[0]["run"]]
        if len(curve) > 1:
            found[name] = curve.assign(tokens=runs[0].get("tokens_per_step_mean"))
    return found if len(found) == 2 else {}


def _loss(source: Source, losses: pd.DataFrame) -> Drawn:
    curves = _curves(source, losses)
    if not curves:
        return None
    figure, (axes,) = _figure(1)
    for index, (name, curve) in enumerate(curves.items()):
        window = max(1, len(curve) // 20)
        axes.plot(curve["step"], curve["loss"], color=METHOD_COLOURS[index], alpha=0.3, linewidth=0.8)
        smooth = curve["loss"].rolling(window, min_periods=1).mean()
        axes.plot(curve["step"], smooth, color=METHOD_COLOURS[index], label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per label token")
    figure.legend(loc="outside upper center", ncols=2)
    ends = "; ".join(f"{name} ends at {curve['loss'].iloc[-1]:.3f}" for name, curve in curves.items())
    return figure, "Loss of one run each, faint as measured, strong as a running mean.", f"Loss over steps: {ends}."


def _speed_by_step(source: Source, losses: pd.DataFrame) -> Drawn:
    curves = _curves(source, losses)
    curves = {name: curve for name, curve in curves.items() if curve["tokens"].notna().all()}
    if len(curves) < 2:
        return None
    figure, (axes,) = _figure(1)
    said = []
    for index, (name, curve) in enumerate(curves.items()):
        seconds = curve["elapsed_s"].diff()
        speed = (curve["step"].diff() * curve["tokens"].astype(float) / seconds)[seconds > 0]
        axes.plot(curve["step"][seconds > 0], speed, color=METHOD_COLOURS[index], label=name, linewidth=1)
        said.append(f"{name}: median {speed.median():,.0f} tokens/s")
    axes.set_xlabel("step")
    axes.set_ylabel("tokens/s, of the mean step")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=2)
    caption = (
        "Steps per second of the training's clock times the mean tokens of a step, one run each. Reading losses and "
        "checkpoints are inside this clock; the tables' throughput leaves them and the first steps out."
    )
    return figure, caption, f"{'; '.join(said)}."


class _Captures:
    """Figures from the facts of captured runs."""

    def __init__(self, source: Source, facts_dir: Path) -> None:
        self._folders = {
            f"{point['method']} {point['strategy']} {int(point['gpus'])}": facts_dir / run["run"]
            for point in source.points
            if point["strategy"] in STRATEGY_COLOURS and int(point["gpus"]) > 1
            for run in source.runs_of(point)[:1]
            if (facts_dir / run["run"] / "summary.json").exists()
        }

    def collectives(self) -> Drawn:
        """Time of collectives by type, waiting apart from transfer where ranks were matched."""
        totals: dict[str, pd.Series] = {}
        for name, folder in self._folders.items():
            frame = pd.read_csv(folder / "collectives.csv")
            if len(frame):
                totals[name] = frame.groupby("collective")["time_ns"].sum() / 1e6
        if not totals:
            return None
        kinds = sorted({kind for total in totals.values() for kind in total.index})
        figure, (axes,) = _figure(1)
        bottom = np.zeros(len(totals))
        for index, kind in enumerate(kinds):
            heights = np.array([float(total.get(kind, 0.0)) for total in totals.values()])
            colour = COLLECTIVE_COLOURS[index % len(COLLECTIVE_COLOURS)]
            axes.bar(range(len(totals)), heights, 0.6, bottom=bottom, label=kind, color=colour, linewidth=0)
            bottom += heights
        axes.set_xticks(range(len(totals)), list(totals), fontsize=7)
        axes.set_ylabel("time in collectives, ms, all ranks")
        figure.legend(loc="outside upper center", ncols=min(4, len(kinds)))
        caption = (
            "Durations of collectives in the captured window, summed over ranks: waiting for a late rank counts. "
            "What of it was exposed is in the table of captures."
        )
        alt = "; ".join(f"{name}: {total.sum():.1f} ms" for name, total in totals.items())
        return figure, caption, f"Time in collectives. {alt}."

    def copies(self) -> Drawn:
        """Bytes copied over time, by where from and where to."""
        lines: dict[str, pd.Series] = {}
        for name, folder in self._folders.items():
            frame = pd.read_csv(folder / "copy_timeline.csv")
            for scope, part in frame.groupby("scope"):
                lines[f"{name}: {scope}"] = part.groupby("bucket_start_ns")["bytes"].sum() * MIB
        if not lines:
            return None
        figure, (axes,) = _figure(1)
        for index, (name, line) in enumerate(lines.items()):
            seconds = (line.index - line.index.min()) / 1e9
            axes.plot(seconds, line.to_numpy(), label=name, color=METHOD_COLOURS[index % len(METHOD_COLOURS)])
        axes.set_xlabel("seconds of the window")
        axes.set_ylabel("MiB copied per bucket")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper center", ncols=2, fontsize=7)
        caption = "Copies within a device and between devices are told apart; collectives are kernels, not copies."
        return figure, caption, "; ".join(f"{name}: {line.sum():.1f} MiB" for name, line in lines.items()) + "."


# --- Columbia ---------------------------------------------------------------------------------------------


def _ladder(source: Source) -> dict[str, Row]:
    """Full fine-tuning and the ranks of LoRA and QLoRA of one experiment."""
    ranks = {**ranks_of(source, "lora"), **ranks_of(source, "qlora")}
    points = {name: point for name, point in ranks.items() if point is not None}
    if not points:
        return {}
    experiment = next(iter(points.values()))["experiment"]
    full = source.first(wanted=lambda one: one["method_kind"] == "full" and one["experiment"] == experiment)
    return ({"full": full} if full is not None else {}) | points


def _rank_bars(source: Source, column: str, factor: float, unit: str) -> Drawn:
    points = _ladder(source)
    values = [_value(point, column, factor) for point in points.values()]
    if not any(values):
        return None
    figure, (axes,) = _figure(1)
    _bars(axes, list(points), {unit: values}, [METHOD_COLOURS[0]], f"{column.replace('_', ' ')}, {unit}", digits=1)
    axes.tick_params(axis="x", rotation=45)
    batches = {int(point["per_device_batch_size"]) for point in points.values()}
    caption = f"From zero, with 95 % intervals. Batch: {', '.join(map(str, sorted(batches)))}."
    if len(batches) > 1:
        caption += " The bars are of different batches and are not to be compared (F32)."
    return figure, caption, _alt(column, list(points), {unit: values})


def _parameters(source: Source) -> Drawn:
    points = _ladder(source)
    values = {name: point["trainable_parameters"] for name, point in points.items() if point["trainable_parameters"]}
    if not values:
        return None
    figure, (axes,) = _figure(1)
    axes.bar(range(len(values)), [float(one) for one in values.values()], 0.7, color=METHOD_COLOURS[0], linewidth=0)
    axes.set_yscale("log")
    axes.set_xticks(range(len(values)), list(values), fontsize=7, rotation=45)
    axes.set_ylabel("trainable parameters, log axis")
    for index, one in enumerate(values.values()):
        axes.annotate(
            f"{one:,.0f}", (index, float(one)), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=6
        )
    caption = "Logical counts: 4-bit weights by their shape, shared ones once, heads included. The axis is logarithmic."
    return figure, caption, "; ".join(f"{name}: {one:,.0f}" for name, one in values.items()) + "."


def _four_by_rank(source: Source, kind: str) -> Drawn:
    points = {name: point for name, point in ranks_of(source, kind).items() if point is not None}
    if len(points) < 2:
        return None
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    ranks = [int(point["rank"]) for point in points.values()]
    for axes, column, factor, unit in (
        (panels[0], "accuracy", 100.0, "accuracy, %"),
        (panels[1], "trainable_parameters", 1e-3, "trainable, thousands"),
        (panels[2], "peak_allocated_bytes", MIB, "peak allocated, MiB"),
        (panels[3], "samples_per_second", 1.0, "examples/s"),
    ):
        for rank, point in zip(ranks, points.values(), strict=True):
            value = _value(point, column, factor)
            if value is None:
                continue
            axes.plot([rank], [value[0]], "o", color=METHOD_COLOURS[1])
            if value[1] != value[2]:
                axes.plot([rank, rank], [value[1], value[2]], color=METHOD_COLOURS[1], linewidth=1.4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
    for axes in panels[2:]:
        axes.set_xlabel("rank")
    alt = "; ".join(f"rank {rank}: {point['accuracy']}" for rank, point in zip(ranks, points.values(), strict=True))
    return figure, "All axes from zero, with 95 % intervals over seeds and examples.", f"Accuracy by rank. {alt}."


def _scatter(source: Source) -> Drawn:
    points = {k: p for k, p in _ladder(source).items() if p["accuracy"] is not None and p["peak_allocated_bytes"]}
    if len(points) < 2:
        return None
    figure, (axes,) = _figure(1)
    for index, (name, point) in enumerate(points.items()):
        x, value = float(point["peak_allocated_bytes"]) * MIB, _value(point, "accuracy", 100)
        assert value is not None
        colour = METHOD_COLOURS[index % len(METHOD_COLOURS)]
        if value[1] != value[2]:
            axes.plot([x, x], [value[1], value[2]], color=colour, linewidth=1.2)
        axes.plot([x], [value[0]], "o", color=colour, label=name)
    axes.set_xlabel("peak allocated, MiB")
    axes.set_ylabel("accuracy, % (zoomed axis)")
    axes.set_xlim(left=0)
    figure.legend(loc="outside right upper", fontsize=7)
    caption = "Accuracy with 95 % intervals over peak memory. The vertical axis is zoomed; intervals say what differs."
    return figure, caption, "; ".join(f"{k}: {100 * p['accuracy']:.1f} %" for k, p in points.items()) + "."


# --- RTX --------------------------------------------------------------------------------------------------


def _rtx(source: Source) -> Drawn:
    points = [point for point in source.points if point["tokens_per_second"] is not None]
    if not points:
        return None
    labels = [f"{point['experiment']}: {point['point']}" for point in points]
    figure = Figure(figsize=(WIDTH, 1.2 + 0.26 * len(points)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, column, function, unit in (
        (panels[0], "tokens_per_second", lambda one: one, "tokens/s"),
        (panels[1], "tokens_per_second", lambda one: 10_000 / one, "s per 10k tokens"),
        (panels[2], "peak_allocated_bytes", lambda one: one * MIB, "peak allocated, MiB"),
    ):
        values = [None if point[column] is None else function(float(point[column])) for point in points]
        colours = [
            METHOD_COLOURS[1] if is_on(point["gradient_checkpointing"]) else METHOD_COLOURS[0] for point in points
        ]
        axes.barh(range(len(points)), [value or 0.0 for value in values], 0.7, color=colours, linewidth=0)
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
    panels[0].set_yticks(range(len(points)), labels, fontsize=6)
    panels[0].invert_yaxis()
    caption = "From zero; energy is in the table, measured by the driver's counter or empty."
    alt = "; ".join(f"{label}: {point['tokens_per_second']:,.0f}" for label, point in zip(labels, points, strict=True))
    return figure, caption, f"Tokens per second. {alt}."
