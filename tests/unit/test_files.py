"""Result files: whole or not there, readable by a team, and never holding what is no number."""

import hashlib
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from tunemap.errors import UserError
from tunemap.files import SEAL, read_json, read_sealed, sha256_of, write_atomic, write_json, write_sealed


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "folder" / "x.json"
    value = {"b": [1, 2.5, None, True], "a": "ä\n\"'"}
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_bytes().decode("utf-8").endswith("}\n")
    assert "ä" in path.read_text(encoding="utf-8")


def test_text_and_bytes(tmp_path):
    write_atomic(tmp_path / "x", "ä\r\n")
    assert (tmp_path / "x").read_bytes() == "ä\r\n".encode()
    write_atomic(tmp_path / "x", b"\x00\xff")
    assert (tmp_path / "x").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    path = tmp_path / "x"
    write_atomic(path, "old")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(f"tunemap.files.os.{step}", fail)
    with pytest.raises(type(error)):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("tunemap.files.os.fsync", lambda descriptor: (done.append("fsync"), fsync(descriptor)))

    def renamed(source, target):
        assert os.stat(source).st_size == 3
        assert os.path.dirname(source) == os.path.dirname(target)  # a rename across file systems is a copy
        done.append("replace")
        replace(source, target)

    monkeypatch.setattr("tunemap.files.os.replace", renamed)
    write_atomic(tmp_path / "x", "new")
    assert done == ["fsync", "replace"]


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "x.json"
    code = (
        "import sys; from pathlib import Path; from tunemap.files import write_json\n"
        "n = 0\n"
        "while True:\n"
        "    write_json(Path(sys.argv[1]), [n] * 20000); n += 1\n"
        "    if n == 1: print('ready', flush=True)\n"
    )
    for delay_s in (0.0, 0.004, 0.013, 0.03):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        values = read_json(path)
        assert len(values) == 20000
        assert len(set(values)) == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_the_mode_is_that_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "x", "x")
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [1, {"a": math.nan}]])
def test_what_is_no_number_is_refused_and_nothing_written(tmp_path, value):
    write_json(tmp_path / "x.json", "old")
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == "old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        read_json(path)
    assert str(refusal.value).startswith(f"{path}: {message} (")
    assert str(refusal.value).endswith("); delete the file and run the workflow again")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"x\.json: no such file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, "ä")
    code = (
        "import sys; from pathlib import Path; from tunemap.files import read_json; "
        "assert read_json(Path(sys.argv[1])) == '\\xe4'"
    )
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": "src"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True)
    assert done.stderr == ""


def test_checksum(tmp_path):
    write_atomic(tmp_path / "x", b"abc" * 100_000)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_json_is_one_value_per_line(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2]}
    assert (tmp_path / "x.json").read_text().count("\n") == 6


def test_any_changed_bit_of_a_sealed_file_is_found_or_changes_nothing(tmp_path):
    path, value = tmp_path / "x.json", {"outcome": "ok", "loss": 1.5e-07, "reason": None, "runs": ["ä", 3]}
    write_sealed(path, value)
    whole, passed = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = read_sealed(path)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert {key: inner for key, inner in found.items() if key != SEAL} == value
            passed += 1
    assert passed <= 8  # an E for an e, and the like


def test_an_object_without_a_seal_is_read_as_it_is(tmp_path):
    for value in ({}, {"a": 1}, {"digest": "0" * 64}):
        write_json(tmp_path / "x.json", value)
        assert read_sealed(tmp_path / "x.json") == value
