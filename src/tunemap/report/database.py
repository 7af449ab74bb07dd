"""The whole study as one SQLite file, for people who would rather ask than read: results/STUDY/study.sqlite.

Tables are the CSV files of the study with their own column names, and what is too long for a table of the report:
every step, every answer, every fact of a capture, every factor with the place it came from. Views answer the common
questions. `docs/database.md` is made from this module; the table `definitions` says the same inside the file.

    sqlite3 results/quickstart/study.sqlite 'select * from pareto_front'
    datasette results/quickstart/study.sqlite
    duckdb -c "attach 'results/quickstart/study.sqlite' as s (type sqlite); select * from s.failed_runs"
"""

from __future__ import annotations

import csv
import json
import math
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tunemap.collect import Tables
from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.report.definitions import DEFINITIONS
from tunemap.report.points import flat_factors

# Values of these are texts even where they look like numbers: a digest such as 12e4 is no number.
TEXTS = ("run", "id", "name", "value", "point", "data_order_hash", "digest", "evaluation_digest", "seed_text")
FLAGS = {"True": 1, "False": 0, "": None}

TABLES = {  # name: what a row is
    "plan": "A factor of a planned run: its value as JSON, and where in the study file it came from.",
    "runs": "A run: how it ended, its factors, and every measurement (NULL where there is none).",
    "experiments": "Membership of a run in an experiment.",
    "points": "A point of an experiment: its runs differ in nothing but their seed; means with 95 % intervals.",
    "comparisons": "A point against its experiment's baseline: differences and ratios with 95 % intervals.",
    "gates": "A validity check of a run or of a comparison.",
    "losses": "A point of a run's loss curve, thinned for drawing.",
    "ranks": "A module whose rank was chosen by a method.",
    "scaling": "A number of devices on a scaling curve.",
    "inference": "A form of a run when it is used: latency in seconds, tokens (or texts) per second, memory.",
    "published": "A published number beside ours, or the reason why they are not compared.",
    "published_tables": "A cell of a table that a published study has, made from these results.",
    "environment": "A name and version of machine or software, with the number of runs that had it.",
    "run_environment": "The same for each run.",
    "steps": "An optimizer step of a rank, as it was timed.",
    "evaluations": "The evaluation of a run.",
    "answers": "A test example as a run answered it; prompts and outputs are in predictions.jsonl.",
    "facts": "A row of a capture's facts: `kind` is the file it is from, `row` counts its rows, one line per value.",
    "definitions": "Unit, definition and source of a column of `runs`.",
}
VIEWS = {  # name: question, query
    "pareto_front": (
        "Which points are on the front of accuracy, throughput and memory, and how sure is that?",
        """SELECT experiment, model, dataset, point, front, front_probability, accuracy, accuracy_low, accuracy_high,
       tokens_per_second, tokens_per_second_low, tokens_per_second_high, peak_allocated_bytes
FROM points WHERE front IS NOT NULL ORDER BY experiment, model, dataset, front_probability DESC""",
    ),
    "failed_runs": (
        "What did not end well, where, and why?",
        """SELECT run, outcome, phase, step, reason, evaluation_outcome, evaluation_reason
FROM runs WHERE outcome <> 'ok' OR evaluation_outcome NOT IN ('ok', 'skipped')""",
    ),
    "tripped_gates": (
        "Which checks did not pass? Fatal ones first.",
        """SELECT gate, fatal, scope, experiment, subject, message FROM gates WHERE passed = 0 ORDER BY fatal DESC""",
    ),
    "memory_parts": (
        "What is the peak memory of each run made of, in MiB?",
        """SELECT run, method, peak_allocated_bytes / 1048576.0 AS peak_mib,
       parameters_bytes / 1048576.0 AS parameters_mib, gradients_bytes / 1048576.0 AS gradients_mib,
       optimizer_bytes / 1048576.0 AS optimizer_mib, activations_bytes / 1048576.0 AS activations_mib,
       other_bytes / 1048576.0 AS other_mib
FROM runs WHERE peak_allocated_bytes IS NOT NULL ORDER BY peak_mib""",
    ),
    "step_parts": (
        "Where does the time of a step go, in milliseconds?",
        """SELECT run, method, 1e3 * step_period_mean_s AS step_ms, 1e3 * data_time_mean_s AS data_ms,
       1e3 * forward_time_mean_s AS forward_ms, 1e3 * backward_time_mean_s AS backward_ms,
       1e3 * optimizer_time_mean_s AS optimizer_ms
FROM runs WHERE step_period_mean_s IS NOT NULL ORDER BY step_ms""",
    ),
    "methods_summary": (
        "What does each method cost and give, over its runs that ended ok? (Tested differences: `comparisons`.)",
        """SELECT model, dataset, method, count(*) AS runs, avg(accuracy) AS accuracy,
       avg(tokens_per_second) AS tokens_per_second, avg(peak_allocated_bytes) AS peak_allocated_bytes,
       avg(energy_per_10k_tokens_joules) AS energy_per_10k_tokens_joules
FROM runs WHERE outcome = 'ok' GROUP BY model, dataset, method""",
    ),
    "hard_examples": (
        "Which test examples do most fine-tuned runs get wrong?",
        """SELECT runs.dataset, answers.id, avg(answers.correct) AS share_correct, count(*) AS runs
FROM answers JOIN runs USING (run) WHERE runs.method_kind <> 'base'
GROUP BY runs.dataset, answers.id ORDER BY share_correct, answers.id""",
    ),
    "unusual_factors": (
        "Which factors were set, and by whom, rather than left at their built-in default?",
        """SELECT run, factor, value, provenance FROM plan
WHERE provenance <> 'built-in default' AND factor <> 'seed'""",
    ),
}


def write_database(plan_path: Path, results_dir: Path, output: Path) -> None:
    """Write the study as SQLite, row by row, under a temporary name first."""
    plan = read_json(plan_path)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(temporary)) as connection, connection:
            connection.execute("PRAGMA journal_mode = OFF")  # a half-written file is never renamed
            _write(connection, plan, results_dir)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def database_differences(database: Path, plan_path: Path, results_dir: Path) -> Iterator[str]:
    """Where a database is not what `write_database` makes of the study now: by table, its first other row."""
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch) / "again.sqlite"
        write_database(plan_path, results_dir, again)
        address = f"{database.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as found, closing(sqlite3.connect(again)) as due:
            try:
                yield from _differences(found, due)
            except sqlite3.DatabaseError as error:
                yield f"damaged ({error})"


def _differences(found: sqlite3.Connection, due: sqlite3.Connection) -> Iterator[str]:
    made = "SELECT name, sql FROM sqlite_master"
    definitions, expected = (dict(connection.execute(made)) for connection in (found, due))
    for name in dict.fromkeys([*expected, *definitions]):
        if definitions.get(name) != expected.get(name):
            state = "is missing" if name not in definitions else "is not made as it is of the study's files"
            yield f"{name} {state}"
        elif name in TABLES:
            rows, rows_due = (connection.execute(f"SELECT * FROM {name}") for connection in (found, due))
            columns = [column for column, *_ in rows.description]
            for number, (row, other) in enumerate(zip_longest(rows, rows_due), 1):
                if (difference := _of_rows(columns, row, other)) is not None:
                    yield f"table {name}, row {number}: {difference}"
                    break


def _of_rows(columns: list[str], row: tuple[Any, ...] | None, due: tuple[Any, ...] | None) -> str | None:
    """How a row differs from what it should be; None if it does not."""
    if row is None or due is None:
        return "missing" if row is None else "the study's files have none"
    for column, value, expected in zip(columns, row, due, strict=True):
        if not _alike(value, expected):
            return f"{column} is {value!r}, the study's files give {expected!r}"
    return None


def _alike(value: Any, other: Any) -> bool:
    """Equal; real numbers to 12 digits, for SQLite's own reading of decimals differs between its versions."""
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-12)
    return bool(value == other)


def _write(connection: sqlite3.Connection, plan: dict[str, Any], results_dir: Path) -> None:
    runs = list(plan["runs"])
    _insert(connection, "plan", ("run", "factor", "value", "provenance"), _plan_rows(plan))
    for field in fields(Tables):
        path = results_dir / "tables" / f"{field.name}.csv"
        with _opened(path) as file:
            reader = csv.reader(file)
            _insert(connection, field.name, tuple(next(reader, ())), reader)
    _insert(connection, "run_environment", ("run", "name", "value"), _environment_rows(results_dir, runs))
    _insert_dicts(connection, "steps", _step_rows(results_dir, runs))
    _insert_dicts(connection, "evaluations", _evaluation_rows(results_dir, runs))
    flags = ("correct", "correct_flexible", "malformed", "truncated")
    _insert(connection, "answers", ("run", "id", *flags), _answer_rows(results_dir, runs, flags))
    facts = ("run", "kind", "row", "name", "value")
    _insert(connection, "facts", facts, _fact_rows(results_dir, runs))
    rows = ((name, one.unit, one.text, one.source) for name, one in DEFINITIONS.items())
    _insert(connection, "definitions", ("column", "unit", "definition", "source"), rows)
    for table in ("steps", "answers", "facts", "losses"):
        connection.execute(f"CREATE INDEX {table}_by_run ON {table} (run)")
    for name, (_, query) in VIEWS.items():
        connection.execute(f"CREATE VIEW {name} AS {query}")


def _opened(path: Path) -> Any:
    try:
        return path.open(newline="", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make the tables first") from None


def _insert(
    connection: sqlite3.Connection, table: str, columns: tuple[str, ...], rows: Iterable[Iterable[Any]]
) -> None:
    """Make a table and fill it; NUMERIC columns turn digits into numbers and leave other texts alone."""
    kinds = ", ".join(f"{_quoted(name)} {'TEXT' if name in TEXTS else 'NUMERIC'}" for name in columns)
    connection.execute(f"CREATE TABLE {table} ({kinds})")
    places = ", ".join("?" * len(columns))
    values = ([_value(value) for value in row] for row in rows)
    connection.executemany(f"INSERT INTO {table} VALUES ({places})", values)


def _insert_dicts(connection: sqlite3.Connection, table: str, rows: Iterator[dict[str, Any]]) -> None:
    """The same for rows as dicts; a column that turns up late is added."""
    columns: list[str] = ["run"]
    connection.execute(f"CREATE TABLE {table} (run TEXT)")
    for row in rows:
        for name in row:
            if name not in columns:
                kind = "TEXT" if name in TEXTS else "NUMERIC"
                connection.execute(f"ALTER TABLE {table} ADD COLUMN {_quoted(name)} {kind}")
                columns.append(name)
        names, places = ", ".join(map(_quoted, row)), ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", [_value(one) for one in row.values()])


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _value(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return FLAGS.get(value, value) if isinstance(value, str) else value


# --- rows -------------------------------------------------------------------------------------------------


def _plan_rows(plan: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for run, planned in plan["runs"].items():
        origins = planned.get("provenance", {})
        for factor, value in flat_factors(planned).items():
            text = value if isinstance(value, str) else json.dumps(value)
            yield run, factor, text, origins.get(factor, "method" if factor.startswith("method.") else "")


def _documents(results_dir: Path, runs: list[str], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(run, JSON object) of each run that has the file; a broken one is a row of `runs` with the reason."""
    for run in runs:
        path = results_dir / name.format(run=run)
        try:
            found = read_json(path) if path.is_file() else None
        except UserError:
            found = None
        if isinstance(found, dict):
            yield run, found


def _environment_rows(results_dir: Path, runs: list[str]) -> Iterator[tuple[str, str, str]]:
    for run, outcome in _documents(results_dir, runs, "runs/{run}/outcome.json"):
        environment = outcome.get("environment")
        for name, value in _flat(environment if isinstance(environment, dict) else {}, ""):
            yield run, name, value


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}.{index}")
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def _step_rows(results_dir: Path, runs: list[str]) -> Iterator[dict[str, Any]]:
    for run in runs:
        path = results_dir / "runs" / run / "steps.csv"
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                yield from ({"run": run} | row for row in csv.DictReader(file))


def _evaluation_rows(results_dir: Path, runs: list[str]) -> Iterator[dict[str, Any]]:
    for run, found in _documents(results_dir, runs, "evaluations/{run}/evaluation.json"):
        yield {"run": run} | {k: v for k, v in found.items() if k != "run" and not isinstance(v, (dict, list))}


def _answer_rows(results_dir: Path, runs: list[str], flags: tuple[str, ...]) -> Iterator[list[Any]]:
    for run in runs:
        path = results_dir / "evaluations" / run / "predictions.jsonl"
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    yield [run, row["id"], *(row.get(flag) for flag in flags)]


def _fact_rows(results_dir: Path, runs: list[str]) -> Iterator[tuple[str, str, int, str, Any]]:
    for run in runs:
        folder = results_dir / "facts" / run
        for path in sorted(folder.glob("*.csv")):
            with path.open(newline="", encoding="utf-8") as file:
                for number, row in enumerate(csv.DictReader(file)):
                    yield from ((run, path.stem, number, name, value) for name, value in row.items())
        if (folder / "summary.json").is_file():
            for number, device in enumerate(read_json(folder / "summary.json")["devices"]):
                yield from ((run, "devices", number, name, value) for name, value in _flat(device, ""))


# --- documentation ----------------------------------------------------------------------------------------


def schema_document() -> str:
    """docs/database.md."""
    tables = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in TABLES.items())
    views = "\n\n".join(
        f"**`{name}`**: {question}\n\n```sql\n{query}\n```" for name, (question, query) in VIEWS.items()
    )
    columns = "\n".join(
        f"| `{name}` | {one.unit or '—'} | {one.text} | {one.source} |" for name, one in DEFINITIONS.items()
    )
    usage = "\n".join(line.strip() for line in (__doc__ or "").splitlines() if line.startswith("    "))
    return f"""# study.sqlite

`results/STUDY/study.sqlite` holds the whole study as tables, for questions that no page foresees. It is made by the
workflow (rule `database`) from the same files as the report. This page is made from `tunemap/report/database.py`.

```sh
{usage}
```

A missing value is NULL, never zero. Units are in the names. Factors of a method are columns with a dot: quote them, as
in `SELECT "method.alpha" FROM runs`. `run` joins `runs`, `plan`, `steps`, `evaluations`, `answers`, `facts`, `losses`
and `run_environment`; `experiment` and `point` join `points` and `comparisons`.

| table | a row is |
| --- | --- |
{tables}

## Views

{views}

## Columns of `runs`

| column | unit | definition | source |
| --- | --- | --- | --- |
{columns}
"""
