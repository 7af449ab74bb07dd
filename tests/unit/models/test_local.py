"""A local model folder is taken over whole, or everything that it lacks is named."""

import os
import shutil

import pytest

from tunemap.config import LocalModel
from tunemap.errors import UserError
from tunemap.files import read_json, sha256_of
from tunemap.models import folder as folder_module
from tunemap.models import prepare


def _local(path) -> LocalModel:
    return LocalModel(source="local", path=str(path))


def test_folder_is_taken_over_with_a_manifest(qwen2, tmp_path):
    prepare(_local(qwen2.name), tmp_path / "m", data_root=qwen2.parent)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "m" / name).read_bytes() == (qwen2 / name).read_bytes()
    manifest = read_json(tmp_path / "m" / "model.json")
    assert manifest["source"] == {"source": "local", "path": qwen2.name}
    assert manifest["files"]["model.safetensors"]["sha256"] == sha256_of(qwen2 / "model.safetensors")
    assert manifest["parameters"] == read_json(qwen2 / "model.json")["parameters"]


def test_large_weights_are_linked(qwen2, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "LARGEST_COPY_BYTES", 10_000)
    prepare(_local(qwen2), tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").readlink() == qwen2 / "model.safetensors"
    assert not (tmp_path / "m" / "config.json").is_symlink()


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError) as error:
        prepare(_local("."), tmp_path / "m", data_root=tmp_path)
    for part in ("no config.json", "no weights", "pytorch_model.bin must be converted", "no tokenizer here"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("tokenizer.json", "no tokenizer here")],
)
def test_one_missing_part_is_named_alone(qwen2, tmp_path, missing, message):
    source = shutil.copytree(qwen2, tmp_path / "source")
    (source / missing).unlink()
    with pytest.raises(UserError, match=rf"is not a model in hub layout: {message}[^;]*(; expected[^;]*)?$"):
        prepare(_local(source), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_absent_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such model folder; `path` of a local model starts at data_root"):
        prepare(_local("nowhere"), tmp_path / "m", data_root=tmp_path)


def test_unfinished_download_is_refused(qwen2, tmp_path):
    source = shutil.copytree(qwen2, tmp_path / "source")
    os.truncate(source / "model.safetensors", 1000)
    with pytest.raises(UserError, match=r"model.safetensors: damaged, perhaps a download that did not finish"):
        prepare(_local(source), tmp_path / "m")


def test_tokenizer_of_another_family_is_refused_rather_than_reinterpreted(qwen2, sources, tmp_path):
    """transformers loads any tokenizer next to a qwen2 config as Qwen's, which splits this one's text otherwise."""
    source = shutil.copytree(qwen2, tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sources / "sentiment" / name, source / name)
    try:
        prepare(_local(source), tmp_path / "m")
    except UserError as error:
        assert "reads it as a Qwen2Tokenizer, with other tokens than it defines" in str(error)  # noqa: PT017
    else:  # a loader that keeps to the file is right, too
        from tunemap.models.loading import load_tokenizer

        assert load_tokenizer(tmp_path / "m").tokenize("a lovely film") == ["a", "lovely", "film"]
