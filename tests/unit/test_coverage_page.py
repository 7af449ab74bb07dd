"""docs/coverage.md: every capability of the published studies has a line, and every path in it exists."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "coverage.md").read_text()
LINES = [line for line in PAGE.splitlines() if re.match(r"\| S\d{3} ", line)]


def test_every_capability_is_there_once_and_in_order():
    assert [line[2:6] for line in LINES] == [f"S{number:03d}" for number in range(1, 85)]


def test_every_line_says_what_where_and_how():
    assert all(all(cell.strip() for cell in line.strip("|").split("|")) for line in LINES)


def test_every_path_exists():
    paths = {path for line in LINES for path in re.findall(r"`([\w./-]+/[\w.-]+|Snakefile)`", line.split("|")[3])}
    assert len(paths) > 40
    assert [path for path in sorted(paths) if not (REPOSITORY / path).exists()] == []


def test_flaws_that_are_named_are_known():
    known = (REPOSITORY / "docs" / "validity.md").read_text()
    assert all(flaw in known for flaw in re.findall(r"F\d\d", PAGE))
