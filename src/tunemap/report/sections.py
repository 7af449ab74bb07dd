"""One section per experiment of the page: question, answer, table with a link behind each number, caveats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunemap.report import words
from tunemap.report.formats import p_text, signed
from tunemap.report.scene import failures, outcome_word

Row = dict[str, Any]
COLUMNS = (
    "Point",
    "Runs ok",
    "Accuracy, %",
    "Throughput, tokens/s",
    "Peak memory, MiB",
    "Loss",
    "Energy, J per 10k tokens",
    "Trainable parameters",
    "Pareto front",
)
ENERGY = COLUMNS.index("Energy, J per 10k tokens")


@dataclass(frozen=True)
class Cell:
    """A value, below it how it compares with the baseline; `failed` where a failure stands for a value."""

    value: str
    below: str = ""
    failed: bool = False


@dataclass(frozen=True)
class TableRow:
    """A point of an experiment; `card` is the id of what each of its numbers leads to."""

    card: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Section:
    """An experiment in the page."""

    name: str
    question: str
    vary: str
    answer: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    caveats: tuple[str, ...]


def section(experiment: dict[str, Any], points: list[Row], comparisons: list[Row], cards: dict[str, str]) -> Section:
    """The words of an experiment; `cards` leads from a point's label to the id of its card."""
    by_label = {(row["model"], row["dataset"], row["point"]): row for row in comparisons}
    places = len({(point["model"], point["dataset"]) for point in points})
    rows = [
        TableRow(
            cards[point["point"]],
            _cells(point, by_label.get((point["model"], point["dataset"], point["point"])), bool(comparisons)),
        )
        for point in points
    ]
    columns: tuple[str, ...] = COLUMNS
    if all(point["energy_per_10k_tokens_joules"] is None for point in points):  # no counter on this machine
        columns = (*columns[:ENERGY], *columns[ENERGY + 1 :])
        rows = [TableRow(row.card, (*row.cells[:ENERGY], *row.cells[ENERGY + 1 :])) for row in rows]
    caveats: dict[str, list[str]] = {}
    for row in comparisons:
        for caveat in filter(None, [row["caveat"], f"not compared: {row['refused']}" if row["refused"] else None]):
            caveats.setdefault(caveat, []).append(row["point"])
    trained = {point["point"] for point in points if point["method_kind"] != "base"}
    return Section(
        name=experiment["name"],
        question=experiment["question"],
        vary=", ".join(experiment["vary"]) or "nothing",
        answer=words.section_answer([row for row in comparisons if row["point"] in trained])
        + (" Points are compared within each model and dataset." if places > 1 else ""),
        columns=columns,
        rows=tuple(rows),
        caveats=tuple(f"{', '.join(names)}: {caveat}." for caveat, names in caveats.items()),
    )


def _cells(point: Row, comparison: Row | None, any_compared: bool) -> tuple[Cell, ...]:
    """One row of an experiment's table; an em dash is a value that does not exist."""
    compared = comparison if comparison and not comparison["refused"] else {}
    is_baseline = comparison is None and point["method_kind"] != "base" and any_compared
    accuracy = words.accuracy_text(point).replace(" %", "")
    cells = [
        Cell(point["point"], "baseline" if is_baseline else ""),
        Cell(f"{point['seeds']} of {point['runs']}", failures(point), failed=bool(failures(point))),
        Cell(accuracy, _difference(compared)),
        Cell(with_interval(point, "tokens_per_second", 1, 0), _ratio(compared, "throughput")),
        Cell(with_interval(point, "peak_allocated_bytes", 2**-20, 1), _ratio(compared, "memory")),
        Cell("" if point["train_loss"] is None else f"{point['train_loss']:.3g}"),
        Cell(with_interval(point, "energy_per_10k_tokens_joules", 1, 1)),
        Cell("" if point["trainable_parameters"] is None else f"{point['trainable_parameters']:,.0f}"),
        Cell(_front_text(point)),
    ]
    if point["seeds"]:
        return tuple(cell if cell.value else Cell("—") for cell in cells)
    ending = "; ".join(outcome_word(part.rsplit(":", 1)[0]) for part in point["outcomes"].split(";"))
    return tuple(cell if cell.value else Cell(ending, failed=True) for cell in cells)


def _front_text(point: Row) -> str:
    if not point["front"]:
        return ""
    return f"{point['front']} ({point['front_probability']:.0%})"


def _difference(row: Row) -> str:
    if row.get("accuracy_difference") is None:
        return ""
    low, high = signed(100 * row["accuracy_difference_low"]), signed(100 * row["accuracy_difference_high"])
    test = f", p {p_text(row['accuracy_p_holm'])}" if row["accuracy_p_holm"] is not None else ""
    return f"{signed(100 * row['accuracy_difference'])} ({low} to {high}): {row['accuracy_verdict']}{test}"


def _ratio(row: Row, measure: str) -> str:
    ratio, low, high = (row.get(f"{measure}_ratio{suffix}") for suffix in ("", "_low", "_high"))
    if ratio is None:
        return ""
    text = f"{ratio:.2f}×"
    if low is not None and high is not None and low != high:
        text += f" ({low:.2f} to {high:.2f})"
    verdict = row.get(f"{measure}_verdict")
    return f"{text}: {verdict}" if verdict else text


def with_interval(row: Row, name: str, factor: float, digits: int) -> str:
    """`1,234 (1,200 to 1,268)`; empty where there is no value. No quantity here can be negative: so is no interval."""
    if row[name] is None:
        return ""
    text = f"{row[name] * factor:,.{digits}f}"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is None or high is None or low == high:
        return text
    return f"{text} ({max(0.0, low) * factor:,.{digits}f} to {high * factor:,.{digits}f})"
