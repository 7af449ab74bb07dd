"""The study as SQLite: what the CSV files say, typed; views that answer; a page of documentation that keeps up."""

import csv
import importlib.util
import os
import sqlite3
import sys
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest

from tunemap.collect import Tables, write_tables
from tunemap.errors import UserError
from tunemap.report.database import TABLES, VIEWS, schema_document, write_database

SPEC = importlib.util.spec_from_file_location("fake_results", Path(__file__).parent / "fake_results.py")
fake_results = importlib.util.module_from_spec(SPEC)
sys.modules["fake_results"] = fake_results
SPEC.loader.exec_module(fake_results)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    fake = fake_results.write(tmp_path_factory.mktemp("database"), seeds=2, examples=20)
    write_tables(fake.plan_path, fake.results_dir)
    facts = fake.results_dir / "facts" / "tiny.arithmetic.lora.seed-0"
    facts.mkdir(parents=True)
    (facts / "phases.csv").write_text("phase,wall_ns\nforward,5\nbackward,7\n")
    return fake


@pytest.fixture(scope="module")
def ask(study):
    path = study.results_dir / "study.sqlite"
    write_database(study.plan_path, study.results_dir, path)
    with closing(sqlite3.connect(path)) as connection:
        yield lambda query: connection.execute(query).fetchall()


def test_every_documented_table_and_view_is_there_and_no_other(ask):
    found = dict(ask("SELECT name, type FROM sqlite_master WHERE type <> 'index'"))
    assert {name for name, kind in found.items() if kind == "table"} == (
        TABLES.keys() | {field.name for field in fields(Tables)}
    )
    assert {name for name, kind in found.items() if kind == "view"} == VIEWS.keys()
    for name in VIEWS:
        ask(f"SELECT * FROM {name}")


def test_tables_say_what_the_csv_files_say(study, ask):
    with (study.results_dir / "tables" / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = ask("SELECT run, tokens_per_second, gradient_checkpointing, typeof(tokens_per_second) FROM runs")
    assert len(found) == len(rows)
    for (run, speed, checkpointing, kind), row in zip(found, rows, strict=True):
        assert run == row["run"]
        assert speed == (float(row["tokens_per_second"]) if row["tokens_per_second"] else None)
        assert kind == ("real" if row["tokens_per_second"] else "null")
        assert checkpointing == (row["gradient_checkpointing"] == "True")


def test_steps_and_answers_are_all_there(study, ask):
    counted = dict(ask("SELECT run, count(*) FROM steps GROUP BY run"))
    for run, steps in counted.items():
        assert steps == len((study.outcome(run).parent / "steps.csv").read_text().splitlines()) - 1
    assert len(counted) > 10
    assert all(
        right == correct
        for right, correct in ask(
            "SELECT sum(a.correct), e.correct FROM answers a JOIN evaluations e USING (run) GROUP BY run"
        )
    )


def test_facts_and_plan_are_long_tables(ask):
    assert ask("SELECT value FROM facts WHERE name = 'wall_ns' AND kind = 'phases' ORDER BY row") == [("5",), ("7",)]
    query = "SELECT value, provenance FROM plan WHERE run = 'tiny.arithmetic.lora.seed-0' AND factor = 'learning_rate'"
    assert ask(query) == [("0.005", "method lora")]


def test_views_answer_the_common_questions(ask):
    assert {row[1] for row in ask("SELECT * FROM failed_runs")} == {"oom", "invalid", "unsupported"}
    gates = ask("SELECT gate, fatal FROM tripped_gates")
    assert gates[0] == ("labels", 1)
    assert {row[0] for row in ask("SELECT method FROM methods_summary")} == {"base", "full", "lora", "qlora"}
    shares = [share for (share,) in ask("SELECT share_correct FROM hard_examples")]
    assert len(shares) == 20
    assert shares == sorted(shares)


def test_tables_that_are_not_there_are_named(study, tmp_path):
    with pytest.raises(UserError, match=r"runs\.csv: No such file or directory; make the tables first"):
        write_database(study.plan_path, tmp_path, tmp_path / "study.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_the_page_of_documentation_is_up_to_date(repository):
    path = repository / "docs" / "database.md"
    if os.environ.get("TUNEMAP_UPDATE_GOLDEN"):
        path.write_text(schema_document())
    assert path.read_text() == schema_document(), "TUNEMAP_UPDATE_GOLDEN=1 pytest tests/unit/report writes it anew"
