"""The page decoder against sqlite3: same numbers, same order, or None."""

import sqlite3

import numpy as np
import pytest
import trace_generator as generator
from hypothesis import given, settings
from hypothesis import strategies as st

from tunemap.trace import nsys
from tunemap.trace.pages import integer_columns

integers = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 1, -1, 127, 128, -128, -129, 2**15, 2**23, -(2**23) - 1, 2**31, 2**47, -(2**47), 2**63 - 1]),
)


def decode(path, table="t", columns=(0, 1, 2), defaults=(7, 8, 9)):
    with sqlite3.connect(path) as database:
        (root,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", [table]).fetchone()
    with path.open("rb") as file:
        return integer_columns(file.fileno(), root, columns, defaults)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(integers, integers, integers), max_size=60), page=st.sampled_from([512, 4096, 65536]))
def test_any_integers_are_read_like_sqlite_does(tmp_path_factory, rows, page):
    path = tmp_path_factory.mktemp("pages") / "t.sqlite"
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA page_size = {page}")
        database.execute("CREATE TABLE t (a INTEGER, b INTEGER, c INTEGER)")
        database.executemany("INSERT INTO t VALUES (?,?,?)", rows)
    expected = [[d if v is None else v for v in column] for column, d in zip(zip(*rows, strict=True), (7, 8, 9))]  # noqa: B905
    found = decode(path)
    assert [column.tolist() for column in found] == (expected or [[], [], []])


def test_deep_trees_with_sparse_rowids_and_deleted_rows(tmp_path):
    path = tmp_path / "t.sqlite"
    rng = np.random.default_rng(0)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA page_size = 512")
        database.execute("CREATE TABLE t (a INTEGER, text TEXT, c INTEGER)")
        database.execute("CREATE TABLE other (x)")  # its pages lie between those of t
        for row in rng.permutation(6000).tolist():
            database.execute(
                "INSERT INTO t (rowid, a, text, c) VALUES (?,?,?,?)", (row**3, row, "x" * (row % 40), -row)
            )
            database.execute("INSERT INTO other VALUES (?)", ("y" * 30,))
        database.execute("DELETE FROM t WHERE a % 5 = 0")
        expected = database.execute("SELECT a, c FROM t").fetchall()
    found = decode(path, columns=(0, 2), defaults=(0, 0))
    assert list(zip(*(column.tolist() for column in found), strict=True)) == expected


@pytest.mark.parametrize(
    ("create", "row"),
    [
        ("a INTEGER, b INTEGER, c REAL", (1, 2, 3.5)),
        ("a INTEGER, b INTEGER, c TEXT", (1, 2, "three")),
        ("a TEXT, b INTEGER, c INTEGER", ("x" * 100_000, 2, 3)),  # on overflow pages
        ("a TEXT, b INTEGER, c INTEGER", ("x" * 200, 2, 3)),  # a serial type of two bytes
    ],
)
def test_what_it_cannot_read_is_none(tmp_path, create, row):
    path = tmp_path / "t.sqlite"
    with sqlite3.connect(path) as database:
        database.execute(f"CREATE TABLE t ({create})")
        database.execute("INSERT INTO t VALUES (?,?,?)", row)
    assert decode(path) is None


def test_a_row_older_than_the_column_is_none(tmp_path):
    path = tmp_path / "t.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (a INTEGER, b INTEGER)")
        database.execute("INSERT INTO t VALUES (1, 2)")
        database.execute("ALTER TABLE t ADD COLUMN c INTEGER DEFAULT 5")
    assert decode(path) is None


def test_a_truncated_file_is_none(tmp_path):
    path = tmp_path / "t.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (a INTEGER, b INTEGER, c INTEGER)")
        database.executemany("INSERT INTO t VALUES (?,?,?)", [(i, i, i) for i in range(5000)])
        (root,) = database.execute("SELECT rootpage FROM sqlite_master").fetchone()
    path.write_bytes(path.read_bytes()[: 4096 * 10])
    with path.open("rb") as file:
        assert integer_columns(file.fileno(), root, (0,), (0,)) is None


@pytest.mark.parametrize(
    "name",
    ["torchrun_2xh100_sendrecv_2026.2", "single_t4_nvtx_2025.3", "synthetic_4gpu", "minimal_2kernels_2026.1"],
)
def test_real_tables_are_decoded_and_equal(shared_traces, name):
    path = shared_traces / "nsys" / f"{name}.sqlite"
    checked = 0
    with sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True) as database:
        tables = [t for (t,) in database.execute("SELECT name FROM sqlite_master WHERE name LIKE 'CUPTI_ACTIVITY%'")]
        for table in tables:
            info = database.execute(f"PRAGMA table_info({table})").fetchall()
            at, names = zip(*((row[0], row[1]) for row in info if row[2] == "INTEGER"), strict=True)
            if "start" not in names or not database.execute(f"SELECT 1 FROM {table}").fetchone():
                continue
            expected = database.execute(
                f"SELECT {', '.join(f'COALESCE({n}, -9)' for n in names)} FROM {table}"
            ).fetchall()
            found = decode(path, table, at, [-9] * len(names))
            assert [column.tolist() for column in found] == [list(c) for c in zip(*expected, strict=True)], table
            checked += len(expected)
    assert checked


def test_the_reader_gives_the_same_without_the_decoder(tmp_path, monkeypatch):
    path = tmp_path / "t.sqlite"
    generator.write_nsys(path, generator.generate(2000), shuffle=3)
    fast = nsys.read_nsys(path, lambda name: name == "forward")
    monkeypatch.setattr(nsys, "integer_columns", lambda *_: None)
    monkeypatch.setattr(nsys, "_CHUNK_ROWS", 100)
    slow = nsys.read_nsys(path, lambda name: name == "forward")
    for part in ("kernels", "copies", "calls", "ranges"):
        a, b = getattr(fast, part), getattr(slow, part)
        assert len(a)
        for column in vars(a):
            assert np.array_equal(getattr(a, column), getattr(b, column)), (part, column)
