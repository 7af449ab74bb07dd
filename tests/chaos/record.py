"""What stands beside the rows of a campaign: seed, duration, sums and the machine, in a JSON file of the same name."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tunemap.files import write_json
from tunemap.measure.environment import environment

REPOSITORY = Path(__file__).resolve().parents[2]


def record(table: Path, *, seed: int, seconds: float, sums: dict[str, Any]) -> None:
    """Write `table`.json."""
    values = {"seed": seed, "seconds": round(seconds), **sums, "environment": environment(REPOSITORY).as_dict()}
    write_json(table.with_suffix(".json"), values)


def sums_by(rows: Iterable[dict[str, Any]], key: str, counted: Iterable[str]) -> dict[str, dict[str, int]]:
    """Number of rows, and the sums of columns, for each value of `key` and for `all`."""
    counted, sums = tuple(counted), defaultdict[str, dict[str, int]](dict)
    for row in rows:
        for group in (str(row[key]), "all"):
            of_group = sums[group]
            of_group["rows"] = of_group.get("rows", 0) + 1
            for column in counted:
                of_group[column] = of_group.get(column, 0) + int(row[column])
    return dict(sums)
