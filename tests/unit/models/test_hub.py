"""A hub model is taken from the cache of HF_HOME, and each way in which the hub can fail has its own advice."""

import json
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
from huggingface_hub import errors

from tunemap.config import HubModel
from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.models import hub, prepare

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _cached(qwen2, home):
    """A model folder as `hf download` leaves it: blobs, a snapshot of links, and the commit that main points to."""
    repository = home / "hub" / "models--someone--small"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True)
    for path in qwen2.iterdir():
        if path.name != "model.json":
            shutil.copyfile(path, repository / "blobs" / path.name)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return home


def test_model_in_the_cache_needs_no_network(qwen2, tmp_path):
    home = _cached(qwen2, tmp_path / "home")
    script = (
        "import sys; from pathlib import Path\n"
        "from tunemap.config import HubModel; from tunemap.models import prepare\n"
        "prepare(HubModel(source='hub', id='someone/small'), Path(sys.argv[1]))"
    )
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("HF_HUB_CACHE", None)
    subprocess.run([sys.executable, "-c", script, tmp_path / "m"], check=True, env=environment)
    manifest = read_json(tmp_path / "m" / "model.json")
    assert manifest["commit"] == COMMIT
    assert manifest["source"] == {"source": "hub", "id": "someone/small", "revision": "main"}
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (qwen2 / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "qwen2"


_ANSWER = Mock(headers={})  # what the hub replied; only its headers are read


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (errors.LocalEntryNotFoundError("no"), r"run `hf download someone/small --revision v2` with the same HF_HOME"),
        (errors.OfflineModeIsEnabled("offline"), "or copy the model here and use `source: local`"),
        (errors.GatedRepoError("gated", response=_ANSWER), "is gated: accept its licence at https://hugg"),
        (errors.RepositoryNotFoundError("404", response=_ANSWER), "no such model on the hub"),
        (errors.RevisionNotFoundError("404", response=_ANSWER), "no revision v2 on the hub; check `revision`"),
        (errors.HFValidationError("bad"), "not a model id of the form owner/name"),
        (OSError(28, "No space left on device"), "the download failed: .*No space left on device"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_failure_says_what_to_do(monkeypatch, tmp_path, failure, message):
    def fail(*_arguments, **_settings):
        raise failure

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"someone/small.*{message}"):
        prepare(HubModel(source="hub", id="someone/small", revision="v2"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
