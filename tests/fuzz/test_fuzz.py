"""A short campaign of fuzzing, and every input that was once handled wrongly."""

import json
from pathlib import Path

import pytest

from tunemap.config import DatasetConfig
from tunemap.data.sources import prepare, read_records
from tunemap.errors import UserError
from tunemap.trace.command import read_traces

from . import campaign, traces

SHORT = {"studies": 200, "datasets": 150, "traces": 100}


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    return campaign.attempts(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", SHORT)
def test_mutated_input_is_taken_rightly_or_refused_in_words(attempts, kind):
    tally = campaign.run(attempts[kind], campaign.SEEDS_APART, SHORT[kind])
    assert tally.faults == []
    assert 0 < tally.kinds["taken"] < SHORT[kind]


# --- found by the campaign ------------------------------------------------------------------------------------

FOUND_DATA = [
    ("train.csv", b"ask,reply\nx,\xff\n", "line 2: not UTF-8 \\(byte 0xff at 3\\); save the file as UTF-8"),
    ("train.jsonl", b'{"ask": "x", "reply": "a"}\n{"ask": "\xc3"}\n', "line 2: not UTF-8"),
    ("train.jsonl", b'{"ask": "\\ud800", "reply": "a"}\n', "line 1: holds half a character"),
    ("train.jsonl", b'{"ask": "x", "reply": NaN}\n', "line 1: not JSON \\(NaN is no JSON value\\)"),
    ("train.jsonl", b'{"ask": "x", "reply": ' + b"1" * 5000 + b"}\n", "line 1: not JSON"),
    ("train.jsonl", b"[" * 5000 + b"\n", "line 1: not JSON"),
    ("train.jsonl", b"\n\n", "empty; expected at least one record"),
    ("train.csv", b"ask,reply\n", "empty; expected at least one record"),
    ("train.csv", b"ask,ask\nx,a\n", "line 1: the column 'ask' occurs 2 times"),
    ("train.csv", b'ask,reply\n"x,a\ny,b\n', "line 3: not a table \\(unexpected end of data\\); check the quotes"),
    ("train.csv", b"ask,reply\nx,a\ny,\n", "line 3: generation-train-1: field 'reply' is ''"),
    (
        "train.jsonl",
        b'{"asks": "x", "reply": "a"}\n',
        "line 1: .*no field 'ask'; it has asks, reply; repair it, or name",
    ),
    ("train.jsonl", b'{"ask": "Tested?", "reply": "a"}\n', "no training row is left, each of 1 is a test row too"),
]


@pytest.mark.parametrize(("name", "content", "message"), FOUND_DATA)
def test_found_dataset_is_refused_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "test.jsonl").write_text('{"ask": "tested", "reply": "b"}\n')
    dataset = DatasetConfig(
        task="generation",
        source="file",
        train_file=name,
        test_file="test.jsonl",
        prompt_field="ask",
        answer_field="reply",
    )
    (tmp_path / "test.jsonl").write_text('{"ask": "tested?", "reply": "b"}\n')
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        prepare(dataset, tmp_path / "out", data_root=tmp_path)


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    for name, content in (("a.csv", "ask,reply\nx,a\n"), ("a.jsonl", '{"ask": "x", "reply": "a"}\n')):
        (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
        assert read_records(tmp_path / name) == [{"ask": "x", "reply": "a"}]


def test_long_cell_is_read(tmp_path):
    (tmp_path / "a.csv").write_text(f"ask\n{'x' * 200_000}\n")
    assert len(read_records(tmp_path / "a.csv")[0]["ask"]) == 200_000


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", 7, "an event is called 7, which is no text"),
        ("name", True, "an event is called True, which is no text"),
        ("ts", 2**60, "its times span .* more than 104 days|wrong type"),
    ],
)
def test_found_kineto_trace_is_refused(tmp_path, field, value, message):
    data = traces.originals(tmp_path)[".json"]
    trace = json.loads(data)
    next(event for event in trace["traceEvents"] if event.get("cat") == "kernel")[field] = value
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(trace))
    with pytest.raises(UserError, match=f"{path}: .*({message})") as refusal:
        read_traces([path])
    assert "write the trace again" in str(refusal.value)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET start = -4611686018427387904 WHERE rowid = 1", "its times span"),
        ("UPDATE CUPTI_ACTIVITY_KIND_MEMCPY SET bytes = 4611686018427387904", "the size of a copy is"),
        ("UPDATE StringIds SET value = x'fffe'", "which is no text|wrong|holds something else"),
    ],
)
def test_found_nsys_export_is_refused(tmp_path, statement, message):
    import sqlite3
    from contextlib import closing

    traces.originals(tmp_path)
    path: Path = tmp_path / "report.sqlite"
    with closing(sqlite3.connect(path)) as database:
        database.execute(statement)
        database.commit()
    with pytest.raises(UserError, match=f"{path}: .*({message})") as refusal:
        read_traces([path])
    assert "again" in str(refusal.value)
