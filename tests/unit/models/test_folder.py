"""A model folder is whole or absent, readable by everyone, and refused when its files are no longer those recorded."""

import os
import signal
import subprocess
import sys

import pytest

from tunemap.errors import UserError
from tunemap.files import read_json, sha256_of
from tunemap.models import folder as module
from tunemap.models.folder import bring, build_folder, check_sizes, weight_files, write_manifest


def test_finished_folder_replaces_the_old_one(tmp_path):
    destination = tmp_path / "model"
    for text in ("old", "new"):
        with build_folder(destination) as folder:
            (folder / f"{text}.txt").write_text(text)
    assert [path.name for path in destination.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [destination]


def test_failure_keeps_the_old_folder_and_leaves_nothing_else(tmp_path):
    destination = tmp_path / "model"
    destination.mkdir()
    (destination / "old.txt").touch()
    with pytest.raises(ZeroDivisionError), build_folder(destination) as folder:
        (folder / f"{1 / len(list(folder.iterdir()))}.txt").touch()
    assert [path.name for path in destination.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [destination]


def test_kill_leaves_no_destination_and_the_next_attempt_starts_clean(tmp_path):
    destination = tmp_path / "model"
    script = (
        "import sys, time; from pathlib import Path; from tunemap.models.folder import build_folder\n"
        "with build_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half.txt').write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, destination], stdout=subprocess.PIPE, env=_environment())
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not destination.exists()
    with build_folder(destination) as folder:
        assert list(folder.iterdir()) == []
        (folder / "whole.txt").touch()
    assert [path.name for path in destination.iterdir()] == ["whole.txt"]
    assert list(tmp_path.iterdir()) == [destination]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_files_become_readable_by_everyone(tmp_path):
    with build_folder(tmp_path / "model") as folder:
        (folder / "model.safetensors").touch(mode=0o600)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_large_file_is_linked_and_small_one_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_COPY_BYTES", 10)
    for name, size in (("small", 10), ("large", 11)):
        (tmp_path / name).write_bytes(b"x" * size)
        (tmp_path / "model").mkdir(exist_ok=True)
        bring(tmp_path / name, tmp_path / "model")
    assert not (tmp_path / "model" / "small").is_symlink()
    assert (tmp_path / "model" / "large").readlink() == tmp_path / "large"
    write_manifest(tmp_path / "model", {})
    recorded = read_json(tmp_path / "model" / "model.json")["files"]["large"]
    assert recorded == {
        "size_bytes": 11,
        "sha256": sha256_of(tmp_path / "large"),
        "linked_to": str(tmp_path / "large"),
    }


def test_changed_and_vanished_files_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_COPY_BYTES", 0)
    model, weights = tmp_path / "model", tmp_path / "model.safetensors"
    model.mkdir()
    weights.write_bytes(b"1234")
    bring(weights, model)
    write_manifest(model, {})
    check_sizes(model)
    weights.write_bytes(b"12345")
    with pytest.raises(
        UserError, match=r"\(a link to .*\) has 5 bytes instead of 4; .*set aside as model.damaged; run"
    ):
        check_sizes(model)
    (tmp_path / "model.damaged").rename(model)
    weights.unlink()
    with pytest.raises(
        UserError, match=r"model.safetensors \(a link to .*\) is gone; .*set aside as model.damaged; run"
    ):
        check_sizes(model)


def test_file_of_the_same_size_with_another_content_is_refused(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("1234")
    write_manifest(model, {})
    (model / "config.json").write_text("1235")
    with pytest.raises(UserError, match=r"config.json changed after it was written; .* set aside as model.damaged"):
        check_sizes(model)
    assert (tmp_path / "model.damaged" / "config.json").read_text() == "1235"


def test_folder_without_manifest_passes_and_missing_folder_does_not(tmp_path):
    check_sizes(tmp_path)
    with pytest.raises(UserError, match="absent: no such model folder"):
        check_sizes(tmp_path / "absent")


def test_weights_in_shards_are_listed_and_a_missing_shard_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "z": "2.safetensors"}}'
    )
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(UserError, match=r"index.json: lists shards that are not there: 2.safetensors"):
        weight_files(tmp_path)
    (tmp_path / "2.safetensors").touch()
    assert [path.name for path in weight_files(tmp_path)] == ["1.safetensors", "2.safetensors"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', r"shard '../elsewhere.safetensors' is no file of this"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "shard '/etc/passwd' is no file of this folder"),
        ('{"weight_map": {"a": "pytorch_model-1.bin"}}', "pytorch_model-1.bin is no .safetensors file"),
        ('{"weight_map": {"a": 1}}', "has no weight_map of tensors"),
        ('{"weight_map": []}', "has no weight_map of tensors"),
        ("[]", "has no weight_map of tensors"),
        ("{", "not valid JSON"),
    ],
)
def test_an_index_names_files_of_its_folder_and_no_pickles(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "pytorch_model-1.bin").touch()
    with pytest.raises(UserError, match=f"index.json: .*{message}"):
        weight_files(tmp_path)
