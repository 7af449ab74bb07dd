"""The page on planning shows the numbers that the benchmarks left."""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "planning.md").read_text()


def rows(name: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_of_published_peaks_is_the_benchmarks():
    shown = re.findall(
        r"^\| ([NC]\d+) \| [^|]+ \| (\d) \| ([\d,.]+) \| ([\d,.]+) \| ([+-][\d.]+)% \| ([\d,.]+) \|$",
        PAGE,
        re.MULTILINE,
    )
    found = [
        (row["number"], row["gpus"], f"{float(row['published_mib']):,.1f}", f"{float(row['planned_mib']):,.1f}",
         f"{100 * float(row['error']):+.1f}", f"{float(row['by_tunemap_mib']):,.1f}")
        for row in rows("planner-published.csv")
    ]  # fmt: skip
    assert shown == found
    assert all(abs(float(error)) <= 10 for *_, error, _ in found)


def test_the_numbers_of_the_tracker_are_the_benchmarks():
    compared = rows("planner-cpu.csv")
    errors = [abs(float(row["error_at_decided_ranks"] or row["error"])) for row in compared]
    said = " ".join(PAGE.split())
    assert f"**Against our own tracker**: {len(errors)} configurations" in said
    assert f"{errors.count(0)} are equal to the byte, the largest difference is {100 * max(errors):.2f} %" in said
