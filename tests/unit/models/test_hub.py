"""A hub model is taken from the cache of HF_HOME, and each way in which the hub can fail has its own advice."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub import constants, errors, snapshot_download

from tunemap.config import HubModel
from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.models import hub, prepare

sys.path.insert(0, str(Path(__file__).parent))

import hub_server

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
        (OSError(28, "No space left on device"), r"the download failed .*No space left on device"),
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


# --- a hub that answers badly -------------------------------------------------------------------------------

MODEL = HubModel(source="hub", id=hub_server.NAME)
WEIGHTS = "model.safetensors"


@pytest.fixture
def server(qwen2, tmp_path, monkeypatch):
    """A hub of one model, the only one that downloads know, and a cache of this test's own."""
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DOWNLOAD_TIMEOUT", 0.3), ("HF_HUB_ETAG_TIMEOUT", 0.3)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between attempts
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    with hub_server.serve(hub_server.Hub(qwen2)) as served:
        settings = {"endpoint": served.url, "cache_dir": tmp_path / "cache", "etag_timeout": 0.5, "token": False}
        monkeypatch.setattr(hub, "snapshot_download", partial(snapshot_download, **settings))
        yield served


def test_a_model_is_downloaded_whole(server, qwen2, tmp_path):
    prepare(MODEL, tmp_path / "m")
    assert read_json(tmp_path / "m" / "model.json")["commit"] == hub_server.COMMIT
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == (qwen2 / WEIGHTS).read_bytes()


@pytest.mark.parametrize("how", ["breaks off", "stalls"])
def test_a_download_that_does_not_finish_is_named_and_finished_by_the_next_start(server, qwen2, tmp_path, how):
    server.breaks_off, server.stalls_s = ({WEIGHTS}, 0.0) if how == "breaks off" else (set(), 2.0)
    with pytest.raises(UserError, match=r"someone/small \(revision main\).*(download failed|cannot be reached)"):
        prepare(MODEL, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    server.breaks_off, server.stalls_s = set(), 0.0
    prepare(MODEL, tmp_path / "m")
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == (qwen2 / WEIGHTS).read_bytes()


def test_a_hub_that_is_gone_is_named_and_a_model_in_the_cache_needs_none(server, tmp_path, monkeypatch):
    nowhere = f"http://127.0.0.1:{free_port()}"
    away = partial(hub.snapshot_download, endpoint=nowhere)
    here = hub.snapshot_download
    monkeypatch.setattr(hub, "snapshot_download", away)
    with pytest.raises(UserError, match=r"the hub cannot be reached\. On a machine"):
        prepare(MODEL, tmp_path / "m")
    monkeypatch.setattr(hub, "snapshot_download", here)
    prepare(MODEL, tmp_path / "m")
    monkeypatch.setattr(hub, "snapshot_download", away)
    prepare(MODEL, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "m" / WEIGHTS).read_bytes()


def test_weights_with_another_content_than_the_hub_has_are_refused(server, qwen2, tmp_path):
    server.changes = {WEIGHTS}
    with pytest.raises(UserError, match=r"model.safetensors in the cache is damaged: remove it with `rm ") as refused:
        prepare(MODEL, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    server.changes = set()
    subprocess.run(str(refused.value).split("`")[1], shell=True, check=True)  # the advice
    prepare(MODEL, tmp_path / "m")
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == (qwen2 / WEIGHTS).read_bytes()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
