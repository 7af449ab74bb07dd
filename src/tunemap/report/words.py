"""The report's sentences, computed from its tables: no claim without its interval, no winner that noise could make."""

from __future__ import annotations

from typing import Any

from tunemap.report.formats import ratio_text, signed
from tunemap.statistics import NOT_DISTINGUISHABLE

Row = dict[str, Any]
WIDE_POINTS = 5.0  # an interval that allows a larger loss of accuracy shows nothing to be kept
MOST_NAMES = 6  # in a sentence; more are counted


def main_experiment(plan: dict[str, Any]) -> dict[str, Any]:
    """The experiment that answers which method to use: the first that varies it, else the first."""
    experiments: list[dict[str, Any]] = plan["experiments"]
    return next((one for one in experiments if "method" in one["vary"]), experiments[0])


def answers(points: list[Row], comparisons: list[Row]) -> list[tuple[str, list[str]]]:
    """What an experiment says, per model and dataset: a heading and its sentences."""
    places = dict.fromkeys((point["model"], point["dataset"]) for point in points)
    return [
        (
            f"{model} on {dataset}",
            _answer(
                [p for p in points if (p["model"], p["dataset"]) == (model, dataset)],
                [c for c in comparisons if (c["model"], c["dataset"]) == (model, dataset)],
            ),
        )
        for model, dataset in places
    ]


def _answer(points: list[Row], comparisons: list[Row]) -> list[str]:
    by_label = {point["point"]: point for point in points}
    trained = [row for row in comparisons if by_label[row["point"]]["method_kind"] != "base"]
    base = [row for row in comparisons if by_label[row["point"]]["method_kind"] == "base"]
    compared = [row for row in trained if not row["refused"]]
    if not compared:
        return [*_alone(points, trained), *_learned(by_label, base)]
    return [_cheapest(compared), *_fastest(compared), *_learned(by_label, base)]


def _alone(points: list[Row], refused: list[Row]) -> list[str]:
    """Sentences for an experiment in which nothing could be compared."""
    measured = [point for point in points if point["method_kind"] != "base" and point["seeds"]]
    if not measured:
        return ["No run ended ok, so there is nothing to recommend; the failed runs are listed below."]
    if refused:
        return [f"{row['point']} was not compared with {row['baseline']}: {row['refused']}." for row in refused]
    point = measured[0]
    accuracy = "" if point["accuracy"] is None else f" with {accuracy_text(point)} of the test answers correct"
    return [f"Only {point['point']} was measured{accuracy}: there is nothing to compare it with."]


def _cheapest(compared: list[Row]) -> str:
    """The point with the least memory whose accuracy holds up, or that there is none."""
    baseline = compared[0]["baseline"]
    smaller = [row for row in compared if row["memory_ratio"] is not None and row["memory_ratio"] < 1]
    holding = [row for row in smaller if row["accuracy_verdict"] in (NOT_DISTINGUISHABLE, "higher")]
    if not holding:
        return f"No point keeps the accuracy of {baseline} with less memory."
    narrow = [row for row in holding if -100 * row["accuracy_difference_low"] <= WIDE_POINTS]
    row = min(narrow or holding, key=lambda one: one["memory_ratio"])
    difference = (
        f"{signed(100 * row['accuracy_difference'])} points, 95 % interval "
        f"{signed(100 * row['accuracy_difference_low'])} to {signed(100 * row['accuracy_difference_high'])}"
    )
    cost = f"at {row['memory_ratio']:.2f}× its peak memory"
    if row["throughput_ratio"] is not None:
        cost += f"; throughput {ratio_text(row, 'throughput_ratio')}: {_speed_word(row['throughput_verdict'])}"
    if row["accuracy_verdict"] == "higher":
        return f"{row['point']} is more accurate than {baseline} ({difference}) {cost}."
    if narrow:
        return f"{row['point']} reaches the accuracy of {baseline} within the interval ({difference}) {cost}."
    worst = -100 * row["accuracy_difference_low"]
    return (
        f"No smaller point is shown to keep the accuracy of {baseline}. The accuracy of {row['point']} is not "
        f"distinguishable from it ({difference}) {cost}. But the interval is wide: it does not exclude a loss of "
        f"{worst:.0f} points; more seeds or more test examples would narrow it."
    )


def _speed_word(verdict: str | None) -> str:
    words = {"higher": "faster", "lower": "slower", "no interval": "one run, so it ranks nothing"}
    return words.get(str(verdict), NOT_DISTINGUISHABLE)


def _fastest(compared: list[Row]) -> list[str]:
    baseline = compared[0]["baseline"]
    judged = [row for row in compared if row["throughput_verdict"] in ("higher", "lower", NOT_DISTINGUISHABLE)]
    if not judged:
        return ["Speeds are not ranked: a throughput of one run has no interval; give the experiment more seeds."]
    faster = [row for row in judged if row["throughput_verdict"] == "higher"]
    if not faster:
        return [f"No point is distinguishably faster than {baseline}."]
    named = ", ".join(f"{row['point']} ({ratio_text(row, 'throughput_ratio')})" for row in faster[:MOST_NAMES])
    more = f" and {len(faster) - MOST_NAMES} more" if len(faster) > MOST_NAMES else ""
    return [f"Distinguishably faster than {baseline}: {named}{more}."]


def _learned(by_label: dict[str, Row], base: list[Row]) -> list[str]:
    """Whether fine-tuning did anything at all."""
    sentences = []
    for row in base:
        baseline, untouched = by_label[row["baseline"]], by_label[row["point"]]
        if row["refused"] or row["accuracy_verdict"] is None or baseline["accuracy"] is None:
            continue
        shares = f"{row['baseline']} {accuracy_text(baseline)}, the untouched model {accuracy_text(untouched)}"
        if row["accuracy_verdict"] == "lower":
            sentences.append(f"Fine-tuning raises the share of correct test answers: {shares}.")
        elif row["accuracy_verdict"] == "higher":
            sentences.append(f"Beware: fine-tuning makes the model worse on this test: {shares}.")
        else:
            sentences.append(f"Beware: this test cannot tell the fine-tuned model from the untouched one: {shares}.")
    return sentences


def accuracy_text(point: Row) -> str:
    """`86.7 % (81.2 to 90.7)`; empty where nothing was evaluated."""
    if point["accuracy"] is None:
        return ""
    text = f"{100 * point['accuracy']:.1f} %"
    if point["accuracy_low"] is None:
        return text
    return f"{text} ({100 * point['accuracy_low']:.1f} to {100 * point['accuracy_high']:.1f})"


def section_answer(comparisons: list[Row]) -> str:
    """What an experiment found, in one sentence: every effect with its interval, and what cannot be told apart."""
    if not comparisons:
        return "Nothing to compare: the experiment has one point."
    compared = [row for row in comparisons if not row["refused"]]
    refused = [row["point"] for row in comparisons if row["refused"]]
    parts = [effect_text(row) for row in compared] if len(compared) <= MOST_EFFECTS else _extremes(compared)
    if refused:
        parts.append(f"not compared: {_names(refused)}")
    baselines = ", ".join(dict.fromkeys(row["baseline"] for row in comparisons))
    return f"Against {baselines}: {'; '.join(parts)}."


MOST_EFFECTS = 3  # points of which a sentence tells everything


def effect_text(row: Row) -> str:
    """`lora is not distinguishable in accuracy (−0.4 points, −2.0 to +1.2), faster (1.30×, 1.20 to 1.40) and ...`."""
    parts = []
    if row["accuracy_verdict"]:
        word = {"higher": "more accurate", "lower": "less accurate"}.get(
            row["accuracy_verdict"], f"{NOT_DISTINGUISHABLE} in accuracy"
        )
        parts.append(f"{word} ({_points_text(row)})")
    if row["throughput_verdict"]:
        word = {"higher": "faster", "lower": "slower", "no interval": "not ranked in speed"}.get(
            row["throughput_verdict"], f"{NOT_DISTINGUISHABLE} in speed"
        )
        parts.append(f"{word} ({ratio_text(row, 'throughput_ratio')})")
    if row["memory_ratio"] is not None:
        parts.append(f"at {row['memory_ratio']:.2f}× the peak memory")
    return f"{row['point']} is {', '.join(parts)}" if parts else f"{row['point']} has nothing to compare"


def _points_text(row: Row) -> str:
    low, high = signed(100 * row["accuracy_difference_low"]), signed(100 * row["accuracy_difference_high"])
    return f"{signed(100 * row['accuracy_difference'])} points, {low} to {high}"


def _extremes(compared: list[Row]) -> list[str]:
    """Of many points: which are more or less accurate, the fastest of those that are faster, the smallest."""
    parts = []
    for word, name in (("more accurate", "higher"), ("less accurate", "lower")):
        found = [row for row in compared if row["accuracy_verdict"] == name]
        if found:
            named = ", ".join(f"{row['point']} ({_points_text(row)})" for row in found[:MOST_EFFECTS])
            more = f" and {len(found) - MOST_EFFECTS} more" if len(found) > MOST_EFFECTS else ""
            parts.append(f"{word}: {named}{more}")
    same = [row for row in compared if row["accuracy_verdict"] == NOT_DISTINGUISHABLE]
    if same:
        parts.append(f"{NOT_DISTINGUISHABLE} in accuracy: {_names([row['point'] for row in same])}")
    for word, name, pick in (("faster", "higher", max), ("slower", "lower", min)):
        found = [row for row in compared if row["throughput_verdict"] == name]
        if found:
            row = pick(found, key=lambda one: one["throughput_ratio"])
            parts.append(f"{len(found)} are {word}, {row['point']} most ({ratio_text(row, 'throughput_ratio')})")
    sized = [row for row in compared if row["memory_ratio"] is not None]
    if sized:
        row = min(sized, key=lambda one: one["memory_ratio"])
        parts.append(f"least memory: {row['point']} ({row['memory_ratio']:.2f}×)")
    return parts or ["nothing to compare"]


def _names(names: list[str]) -> str:
    if len(names) > MOST_NAMES:
        return f"{len(names)} points"
    return ", ".join(names)
