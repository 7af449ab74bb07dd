"""The figures of a study, drawn from its tables: the same tables give the same bytes.

    figures/EXPERIMENT-tradeoff | accuracy | throughput | memory | loss | step .svg .pdf .png
    figures/figures.json        title, caption and alternative text of each, for the report

A method has one colour in all figures of a study. Runs that failed are marked where their number would stand.
"""

from __future__ import annotations

import io
import json
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from tunemap.collect import Tables, read_tables
from tunemap.files import read_json, write_atomic
from tunemap.report.captures import PHASES, Captured, read_captures
from tunemap.report.rank_map import draw_ranks
from tunemap.report.tables import records

STYLE = Path(__file__).with_name("tunemap.mplstyle")
INK, AXIS, GRID, PAPER = "#1b1f24", "#7a828c", "#d5dae0", "#ffffff"  # as in the style file
BASE_COLOUR = "#7f7f7f"
FAILURE_COLOUR = "#c0392b"
WIDTH = 7.2  # inches; the text width of the report and of a double-column page
ROW_HEIGHT = 0.34
LABEL_CHARACTERS = 34
MOST_LABELS = 14  # on a trade-off map; beyond, only the front is named
FORMATS: dict[str, dict[str, Any]] = {  # no dates, so that equal input gives equal files
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}
OUTCOME_WORDS = {
    "oom": "out of memory",
    "timeout": "time limit",
    "error": "error",
    "invalid": "invalid",
    "unsupported": "not supported",
    "missing": "not run",
}
PARTS = {  # of peak memory; a sequence of one hue, so that no part is taken for a method
    "parameters_bytes": ("parameters", "#46566c"),
    "gradients_bytes": ("gradients", "#6b7c93"),
    "optimizer_bytes": ("optimizer", "#93a3b8"),
    "activations_bytes": ("activations", "#b9c5d3"),
    "other_bytes": ("other", "#dfe5ec"),
}
FRONT_FILL = {"on the front": "full", "undecided": "left", "beaten": "none"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Drawing:
    """What the report says about a figure; `name` is the file name without its ending."""

    name: str
    experiment: str
    kind: str
    title: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Scene:
    """One experiment with everything that its figures need."""

    name: str
    points: list[Row]
    runs: pd.DataFrame
    losses: pd.DataFrame
    colours: dict[str, Any]
    captures: list[Captured]
    ranks: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def trained(self) -> list[Row]:
        """Points without the rows of the untouched model."""
        return [point for point in self.points if point["method_kind"] != "base"]

    def places(self) -> dict[tuple[str, str], list[Row]]:
        """Points by model and dataset."""
        places: dict[tuple[str, str], list[Row]] = {}
        for point in self.trained:
            places.setdefault((point["model"], point["dataset"]), []).append(point)
        return places


def write_figures(tables_dir: Path, figures_dir: Path, plan_path: Path) -> None:
    """Draw every figure that has something to show, as SVG, PDF and PNG, and figures.json that describes them."""
    drawings = []
    with matplotlib.style.context(STYLE):
        for scene in scenes(read_json(plan_path), read_tables(tables_dir), figures_dir.parent / "facts"):
            for kind, (draw, title) in KINDS.items():
                drawn = draw(scene)
                if drawn is None:
                    continue
                figure, caption, alt = drawn
                name = f"{scene.name}-{kind}"
                for ending, metadata in FORMATS.items():
                    buffer = io.BytesIO()
                    figure.savefig(buffer, format=ending, metadata=metadata)
                    write_atomic(figures_dir / f"{name}.{ending}", buffer.getvalue())
                drawings.append(Drawing(name, scene.name, kind, title, caption, alt))
    index = [asdict(drawing) for drawing in drawings]
    write_atomic(figures_dir / "figures.json", json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def scenes(plan: dict[str, Any], tables: Tables, facts_dir: Path) -> list[Scene]:
    """The experiments of a plan with their rows of the tables and the facts of their captures."""
    colours = method_colours(plan)
    all_points, members = records(tables.points), tables.experiments
    drawn = []
    for experiment in plan["experiments"]:
        name = experiment["name"]
        runs = set(members.loc[members["experiment"] == name, "run"])
        labels = {run: label for label, group in point_runs(plan, experiment).items() for run in group}
        in_scene = tables.runs[tables.runs["run"].isin(runs)].copy()
        chosen = tables.ranks[tables.ranks["run"].isin(runs)]
        drawn.append(
            Scene(
                name,
                [point for point in all_points if point["experiment"] == name],
                in_scene.assign(point=in_scene["run"].map(labels)),
                tables.losses[tables.losses["run"].isin(runs)],
                colours,
                read_captures(facts_dir, {run: labels[run] for run in experiment.get("captures", [])}),
                chosen.assign(point=chosen["run"].map(labels)),
            )
        )
    return drawn


def point_runs(plan: dict[str, Any], experiment: dict[str, Any]) -> dict[str, list[str]]:
    """The runs behind each point of an experiment, by the point's label."""
    from tunemap.report.tables import Result, points_of

    blank = {run: Result(run, planned, "missing") for run, planned in plan["runs"].items()}
    return {point.label: [r.run for r in point.results] for point in points_of(plan, experiment, blank)}


def method_colours(plan: dict[str, Any]) -> dict[str, Any]:
    """A colour for each method of a study, in the plan's order, safe for colour-blind readers; the base is grey."""
    kinds = {run["method_name"]: run["method"]["kind"] for run in plan["runs"].values()}
    palette = [colour for colour in sns.color_palette("colorblind").as_hex() if colour != "#949494"]
    methods = [name for name, kind in kinds.items() if kind != "base"]
    colours = {name: palette[index % len(palette)] for index, name in enumerate(methods)}
    return colours | {name: BASE_COLOUR for name, kind in kinds.items() if kind == "base"}


# --- rows: one line per point -----------------------------------------------------------------------------


def _row_axes(points: list[Row], title: str, unit: str) -> tuple[Figure, Axes]:
    """An axis with one labelled line per point, first point on top, notes on failed runs at the right."""
    labels = [textwrap.fill(point["point"], LABEL_CHARACTERS) for point in points]
    lines = sum(max(1, 0.62 * (label.count("\n") + 1)) for label in labels)
    figure = Figure(figsize=(WIDTH, 1.0 + ROW_HEIGHT * lines), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(points)), labels)
    axes.set_ylim(len(points) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    axes.set_xlabel(unit)
    for row, point in enumerate(points):
        note = _failures(point)
        if note:
            place = (0.01, row) if point["seeds"] == 0 else (1.01, row)
            axes.text(
                *place,
                f"× {note}",
                transform=axes.get_yaxis_transform(),
                color=FAILURE_COLOUR,
                va="center",
                fontsize=8,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5},
            )
        if point["seeds"] == 0:
            axes.axhspan(row - 0.4, row + 0.4, color=FAILURE_COLOUR, alpha=0.08, linewidth=0)
    return figure, axes


def _failures(point: Row) -> str:
    """`1 of 3 out of memory`, or nothing where all runs ended ok."""
    counts = dict(part.rsplit(":", 1) for part in point["outcomes"].split(";"))
    return ", ".join(
        f"{count} of {point['runs']} {OUTCOME_WORDS.get(outcome, outcome)}"
        for outcome, count in counts.items()
        if outcome != "ok"
    )


def _dots(scene: Scene, axes: Axes, points: list[Row], name: str, factor: float) -> None:
    """Mean with its interval, and each run as a small dot below it."""
    single = scene.runs[scene.runs["outcome"] == "ok"]
    for row, point in enumerate(points):
        if point[name] is None:
            continue
        colour = scene.colours[point["method"]]
        values = pd.to_numeric(single.loc[single["point"] == point["point"], name]).dropna() * factor
        if len(values) > 1:
            axes.plot(values, [row + 0.24] * len(values), "o", color=colour, markersize=2.6, alpha=0.75, mew=0)
        if point[f"{name}_low"] is not None:
            ends = [point[f"{name}_low"] * factor, point[f"{name}_high"] * factor]
            axes.plot(ends, [row, row], "-", color=colour, linewidth=2.2)
        axes.plot([point[name] * factor], [row], "o", color=colour, markersize=6.5, markeredgecolor=PAPER, mew=0.8)


def draw_throughput(scene: Scene) -> tuple[Figure, str, str] | None:
    """Real tokens per second of each point."""
    points = scene.trained
    if all(point["tokens_per_second"] is None for point in points):
        return None
    figure, axes = _row_axes(points, "Throughput", "real (non-padding) tokens per second")
    _dots(scene, axes, points, "tokens_per_second", 1)
    axes.set_xlim(left=0)
    axes.set_xlim(right=_far_end(points, "tokens_per_second") * 1.04)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    caption = (
        "Real tokens per second: mean over seeds with 95 % t interval; small dots are single runs. "
        "A point without a line has one run, so nothing is known of its spread."
    )
    return figure, caption, _alternative("Throughput in tokens per second", points, "tokens_per_second", 1, 0)


def _far_end(points: list[Row], name: str) -> float:
    """The largest mean or interval end, but no further than twice the largest mean: the rest is cut."""
    means = [point[name] for point in points if point[name] is not None]
    ends = [point[f"{name}_high"] for point in points if point[f"{name}_high"] is not None]
    return float(min(max([*means, *ends]), 2 * max(means)))


def draw_accuracy(scene: Scene) -> tuple[Figure, str, str] | None:
    """Accuracy of each point and of the untouched model."""
    points = scene.points
    if all(point["accuracy"] is None for point in points):
        return None
    metric = next(point["metric"] for point in points if point["metric"])
    figure, axes = _row_axes(points, "Accuracy on the test split", f"{metric.replace('_', ' ')}, %")
    _dots(scene, axes, points, "accuracy", 100)
    for point in points:
        if point["method_kind"] == "base" and point["accuracy"] is not None:
            axes.axvline(100 * point["accuracy"], color=BASE_COLOUR, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    lows = [point["accuracy_low"] for point in points if point["accuracy_low"] is not None]
    highs = [point["accuracy_high"] for point in points if point["accuracy_high"] is not None]
    axes.set_xlim(max(-1, 100 * min(lows) - 4), min(101, 100 * max(highs) + 4))
    caption = (
        "Share of correct test answers: mean over seeds with 95 % interval for other examples and other seeds "
        "(Wilson's, for examples alone, where there is one seed); small dots are single runs. "
        "The dashed line is the model without fine-tuning."
    )
    return figure, caption, _alternative("Accuracy in percent", points, "accuracy", 100, 1)


def draw_memory(scene: Scene) -> tuple[Figure, str, str] | None:
    """Peak allocated memory of each point, with its parts where they were measured."""
    points = scene.trained
    peaks = [point["peak_allocated_bytes"] for point in points if point["peak_allocated_bytes"] is not None]
    if not peaks:
        return None
    unit, size = ("GiB", 2**30) if max(peaks) >= 2 * 2**30 else ("MiB", 2**20)
    figure, axes = _row_axes(points, "Peak memory of training", f"peak allocated, {unit}")
    parts = [part for part in PARTS if any(point[part] for point in points)]
    for row, point in enumerate(points):
        if point["peak_allocated_bytes"] is None:
            continue
        left = 0.0
        for part in parts:
            width = (point[part] or 0) / size
            axes.barh(row, width, left=left, height=0.56, color=PARTS[part][1], linewidth=0)
            left += width
        peak, colour = point["peak_allocated_bytes"] / size, scene.colours[point["method"]]
        if not parts:
            axes.barh(row, peak, height=0.56, color=colour, linewidth=0)
        low, high = point["peak_allocated_bytes_low"], point["peak_allocated_bytes_high"]
        if low is not None:
            axes.plot([low / size, high / size], [row, row], "-", color=INK, linewidth=1.4)
        axes.plot([peak], [row], "o", color=colour, markersize=7, markeredgecolor=PAPER, mew=0.8)
        axes.annotate(f"{peak:,.1f}", (peak, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.14 * max(peaks) / size)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    if parts:
        handles = [Line2D([], [], marker="s", linestyle="", color=PARTS[part][1], markersize=8) for part in parts]
        figure.legend(handles, [PARTS[part][0] for part in parts], loc="outside lower center", ncols=len(parts))
    caption = "Largest memory allocated on a device during training: the dot is the mean over seeds" + (
        ", the bar shows what it was used for at that moment." if parts else "."
    )
    return figure, caption, _alternative(f"Peak memory in {unit}", points, "peak_allocated_bytes", 1 / size, 1)


def _alternative(what: str, points: list[Row], name: str, factor: float, digits: int) -> str:
    """The figure in words, for readers who do not see it."""
    values = []
    for point in points:
        if point[name] is None:
            values.append(f"{point['point']}: {_failures(point) or 'no value'}")
            continue
        text = f"{point['point']}: {point[name] * factor:,.{digits}f}"
        if point[f"{name}_low"] is not None:
            low, high = point[f"{name}_low"] * factor, point[f"{name}_high"] * factor
            text += f" ({low:,.{digits}f} to {high:,.{digits}f})"
        values.append(text)
    return f"{what}. {'; '.join(values)}."


# --- curves -----------------------------------------------------------------------------------------------


def draw_loss(scene: Scene) -> tuple[Figure, str, str] | None:
    """Training loss against optimizer steps and against time; one row of panels per model and dataset."""
    ok = scene.runs.loc[(scene.runs["outcome"] == "ok") & scene.runs["run"].isin(scene.losses["run"])]
    places = {place: [p for p in points if p["point"] in set(ok["point"])] for place, points in scene.places().items()}
    places = {place: points for place, points in places.items() if points}
    if not places:
        return None
    named = [point for points in places.values() for point in points]
    by_method = len(named) > 20
    entries = len({point["method"] for point in named}) if by_method else len(named)
    columns = max(1, min(entries, 84 // (6 + max(len(point["point"]) for point in named))))
    height = 2.7 * len(places) + 0.3 + 0.19 * -(-entries // columns)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(len(places), 2, squeeze=False, sharey="row")
    curves = dict(list(scene.losses.groupby("run", sort=False)))
    handles: dict[str, Line2D] = {}
    for (place, points), panels in zip(places.items(), grid, strict=True):
        looks = _line_looks(points, scene.colours)
        for axes, against, label in zip(
            panels, ("step", "elapsed_s"), ("optimizer step", "training time, s"), strict=True
        ):
            for point in points:
                runs = [curves[run] for run in ok.loc[ok["point"] == point["point"], "run"]]
                _draw_curves(axes, runs, against, looks[point["point"]])
                name = point["method"] if by_method else point["point"]
                handles.setdefault(name, Line2D([], [], linewidth=1.8, **looks[point["point"]]))
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
        panels[0].set_ylabel("training loss")
        if len(places) > 1:
            panels[0].set_title(" · ".join(place))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
    finals = [
        f"{point['point']}: ends at {point['train_loss']:.3g}" for point in named if point["train_loss"] is not None
    ]
    caption = "Training loss against steps (left) and time (right): mean over seeds, thin lines are single runs."
    if by_method:
        caption += " So many lines are named by their method alone; lighter ones come later in the table."
    return figure, caption, f"Loss curves. {'; '.join(finals)}."


def _line_looks(points: list[Row], colours: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour of the method; dashes, then lighter shades, tell the points of a method apart."""
    seen: dict[str, int] = {}
    counts = pd.Series([point["method"] for point in points]).value_counts()
    looks = {}
    for point in points:
        index = seen.get(point["method"], 0)
        seen[point["method"]] = index + 1
        shades = sns.light_palette(
            colours[point["method"]], n_colors=counts[point["method"]] + 4, reverse=True
        ).as_hex()
        colour = shades[index] if counts[point["method"]] > len(DASHES) else colours[point["method"]]
        looks[point["point"]] = {"color": colour, "linestyle": DASHES[index % len(DASHES)]}
    return looks


DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.4, 1.2, 1.4)))


def _draw_curves(axes: Axes, runs: list[pd.DataFrame], against: str, look: dict[str, Any]) -> None:
    if len(runs) > 1:
        for run in runs:
            axes.plot(run[against], run["loss"], linewidth=0.6, alpha=0.28, color=look["color"])
    start = max(float(run[against].iloc[0]) for run in runs)
    end = min(float(run[against].iloc[-1]) for run in runs)
    grid = np.linspace(start, end, max(2, len(runs[0])))
    mean = np.mean([np.interp(grid, run[against], run["loss"]) for run in runs], axis=0)
    axes.plot(grid, mean, linewidth=1.6, **look)


# --- the trade-off map ------------------------------------------------------------------------------------


def draw_tradeoff(scene: Scene) -> tuple[Figure, str, str] | None:
    """Memory against throughput with accuracy beside each point, one panel per model and dataset."""
    places = {
        place: [p for p in points if p["peak_allocated_bytes"] is not None and p["tokens_per_second"] is not None]
        for place, points in scene.places().items()
    }
    places = {place: points for place, points in places.items() if points}
    if not places:
        return None
    figure = Figure(figsize=(WIDTH, 4.1 * len(places) + 0.5), layout="constrained")
    panels = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    texts = []
    for (place, points), axes in zip(places.items(), panels, strict=True):
        texts.append(_draw_map(scene, axes, points))
        if len(places) > 1:
            axes.set_title(" · ".join(place))
    _map_legend(figure, scene, [point for points in places.values() for point in points])
    for axes, wanted in zip(panels, texts, strict=True):
        _place_labels(figure, axes, wanted)
    lost = [f"{point['point']} ({_failures(point) or 'no value'})" for point in scene.trained]
    lost = [text for text, point in zip(lost, scene.trained, strict=True) if point["peak_allocated_bytes"] is None]
    caption = (
        "Up and to the left is better; beside each point its accuracy with 95 % interval. Bars are 95 % intervals over "
        "seeds. Filled: on the Pareto front of memory, throughput and accuracy with at least 95 % probability; "
        "empty: beaten with at least 95 %; half: undecided or unknown."
    )
    if max(map(len, places.values())) > MOST_LABELS:
        caption += " Of so many points only those on the front are named; the table has the others."
    if lost:
        caption += f" Not on the map: {', '.join(lost)}."
    words = [
        f"{point['point']}: {point['peak_allocated_bytes'] / 2**20:,.0f} MiB, {point['tokens_per_second']:,.0f} "
        f"tokens/s, accuracy {_accuracy(point) or 'unknown'}, {point['front'] or 'front unknown'}"
        for points in places.values()
        for point in points
    ]
    return figure, caption, f"Peak memory against throughput. {'; '.join(words)}."


def _draw_map(scene: Scene, axes: Axes, points: list[Row]) -> list[tuple[tuple[float, float], str]]:
    """Points and bars; returns the labels that want a place."""
    unit, size = ("GiB", 2**30) if max(p["peak_allocated_bytes"] for p in points) >= 2 * 2**30 else ("MiB", 2**20)
    wanted = []
    for point in points:
        x, y = point["peak_allocated_bytes"] / size, point["tokens_per_second"]
        colour = scene.colours[point["method"]]
        for name, place in (("tokens_per_second", ([x, x], None)), ("peak_allocated_bytes", (None, [y, y]))):
            low, high = point[f"{name}_low"], point[f"{name}_high"]
            if low is not None:
                ends = [low, high] if place[0] else [low / size, high / size]
                axes.plot(place[0] or ends, place[1] or ends, "-", color=colour, linewidth=1.2, alpha=0.6)
        fill = FRONT_FILL.get(point["front"], "left")
        axes.plot([x], [y], "o", color=colour, markersize=8, fillstyle=fill, markerfacecoloralt=PAPER, mew=1.6)
        accuracy = _accuracy(point)
        if len(points) <= MOST_LABELS or point["front"] == "on the front":
            text = textwrap.fill(point["point"], 24)
            wanted.append(((x, y), f"{text}\n{accuracy}" if accuracy else text))
    peaks = [point["peak_allocated_bytes"] / size for point in points]
    speeds = [point["tokens_per_second"] for point in points]
    axes.set_xlim(_near_end(peaks), 1.12 * max(peaks))
    axes.set_ylim(_near_end(speeds), 1.12 * _far_end(points, "tokens_per_second"))
    axes.set_xlabel(f"peak allocated memory, {unit}")
    axes.set_ylabel("real tokens per second")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return wanted


def _near_end(values: list[float]) -> float:
    """Zero, unless all values are far from it and would lie on a heap."""
    return 0.0 if min(values) < 0.5 * max(values) else 0.8 * min(values)


def _accuracy(point: Row) -> str:
    if point["accuracy"] is None:
        return ""
    return f"{100 * point['accuracy']:.1f} % ({100 * point['accuracy_low']:.0f}–{100 * point['accuracy_high']:.0f})"


def _map_legend(figure: Figure, scene: Scene, points: list[Row]) -> None:
    methods = dict.fromkeys(point["method"] for point in points)
    handles = [Line2D([], [], marker="o", linestyle="", color=scene.colours[method]) for method in methods]
    names = list(methods)
    for name, fill in FRONT_FILL.items():
        handles.append(Line2D([], [], marker="o", linestyle="", color=AXIS, fillstyle=fill, markerfacecoloralt=PAPER))
        names.append(name)
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 7))


def _place_labels(figure: Figure, axes: Axes, wanted: list[tuple[tuple[float, float], str]]) -> None:
    """Put each label where it covers no point, no other label and no edge; leave it out where there is no room."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    frame = axes.get_window_extent(renderer)
    pixels = [axes.transData.transform(place) for place, _ in wanted]
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in pixels]
    taken += [line.get_window_extent(renderer).padded(1) for line in axes.lines if line.get_linestyle() == "-"]
    for place, text in wanted:
        for dx, dy, across, up in LABEL_PLACES:
            label = axes.annotate(
                text, place, xytext=(dx, dy), textcoords="offset points", ha=across, va=up, fontsize=8, linespacing=1.15
            )
            label.set_in_layout(False)  # the layout was made before, and must not move under the labels
            box = label.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                if max(abs(dx), abs(dy)) > 20:
                    axes.annotate(
                        "",
                        place,
                        xytext=(dx, dy),
                        textcoords="offset points",
                        arrowprops={"arrowstyle": "-", "color": AXIS, "lw": 0.6, "shrinkB": 5},
                    )
                break
            label.remove()


LABEL_PLACES: tuple[tuple[float, float, str, str], ...] = tuple(
    (dx * distance, dy * distance, across, up)
    for distance in (8, 16, 28, 44, 64)
    for dx, dy, across, up in (
        (1, 0, "left", "center"),
        (-1, 0, "right", "center"),
        (0.7, 0.7, "left", "bottom"),
        (0.7, -0.7, "left", "top"),
        (-0.7, 0.7, "right", "bottom"),
        (-0.7, -0.7, "right", "top"),
        (0, 1, "center", "bottom"),
        (0, -1, "center", "top"),
    )
)


def draw_step(scene: Scene) -> tuple[Figure, str, str] | None:
    """Where the time of a step goes: phases as bars, kernel categories as their parts, one panel per captured run."""
    captures = scene.captures
    if not captures:
        return None
    total: Counter[str] = Counter()
    for capture in captures:
        total.update(capture.categories)
    named = [name for name, _ in total.most_common(MOST_CATEGORIES)]
    colours = dict(zip(named, sns.color_palette("colorblind", len(named)).as_hex(), strict=True))
    phases = [phase for phase in PHASES if any((phase, c) in capture.wall_ms for capture in captures for c in total)]
    height = 0.9 + len(captures) * (0.5 + 0.24 * (len(phases) + 1))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(len(captures), sharex=True, squeeze=False)[:, 0]
    for axes, capture in zip(panels, captures, strict=True):
        _draw_phases(axes, capture, phases, colours)
    panels[-1].set_xlabel("milliseconds of a step, under the profiler")
    handles = [Line2D([], [], marker="s", linestyle="", color=colour, markersize=8) for colour in colours.values()]
    handles += [Line2D([], [], marker="s", linestyle="", color=GRID, markersize=8)]
    figure.legend(handles, [*named, "other categories"], loc="outside lower center", ncols=5)
    slowed = [f"{c.point} {c.profiled_to_unprofiled_ratio:.2f}" for c in captures if c.profiled_to_unprofiled_ratio]
    longest = "; ".join(
        f"{c.point}: " + ", ".join(f"{name} {share:.0%}" for name, share in c.operators) for c in captures
    )
    caption = (
        "A few steps under torch.profiler, first seed of each point: time of operators by the phase they belong to; "
        f"idle is time without any. Step time under the profiler over the step time without it: {', '.join(slowed)}. "
        f"Longest operators, share of busy time: {longest}."
    )
    alt = "Milliseconds of a step by phase. " + ". ".join(
        f"{c.point}: " + ", ".join(f"{phase} {_phase_ms(c, phase):.1f}" for phase in phases) for c in captures
    )
    return figure, caption, alt


MOST_CATEGORIES = 8


def _phase_ms(capture: Captured, phase: str) -> float:
    return sum(ms for (where, _), ms in capture.wall_ms.items() if where == phase)


def _draw_phases(axes: Axes, capture: Captured, phases: list[str], colours: dict[str, str]) -> None:
    for row, phase in enumerate(phases):
        left = 0.0
        for category in (*colours, None):
            width = sum(
                ms
                for (where, name), ms in capture.wall_ms.items()
                if where == phase and (name == category if category else name not in colours)
            )
            axes.barh(row, width, left=left, height=0.7, color=colours.get(category or "", GRID), linewidth=0)
            left += width
    axes.barh(len(phases), capture.idle_ms, height=0.7, color=PAPER, edgecolor=AXIS, linewidth=0.8)
    axes.set_yticks(range(len(phases) + 1), [*phases, "idle"])
    axes.set_ylim(len(phases) + 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_title(capture.point, loc="left", fontsize=9)


KINDS: dict[str, tuple[Callable[[Scene], tuple[Figure, str, str] | None], str]] = {
    "tradeoff": (draw_tradeoff, "Trade-off map"),
    "accuracy": (draw_accuracy, "Accuracy"),
    "throughput": (draw_throughput, "Throughput"),
    "memory": (draw_memory, "Peak memory"),
    "loss": (draw_loss, "Loss"),
    "step": (draw_step, "Where a step goes"),
    "ranks": (lambda scene: draw_ranks(scene.ranks), "Ranks and importances by layer"),
}
