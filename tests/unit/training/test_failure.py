"""A process that cannot write why it failed says so by its exit code, and no outcome is made of a full disk."""

import errno
import os

import pytest

from tunemap import files
from tunemap.errors import UserError
from tunemap.files import write_json
from tunemap.training import launch as launching
from tunemap.training.devices import Devices
from tunemap.training.failure import NO_DISK, describe, how_it_ended, is_of_storage, leave_failure, read_failures


@pytest.fixture
def failure():
    return describe(ValueError("a cause"), rank=0, phase="train", step=3)


def test_a_failure_is_left_for_the_launcher(tmp_path, failure):
    assert leave_failure(tmp_path, failure) == 1
    assert read_failures(tmp_path) == [failure]


def test_a_full_disk_leaves_an_exit_code_and_words_in_the_log(tmp_path, monkeypatch, capsys, failure):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.tempfile, "mkstemp", full)
    assert leave_failure(tmp_path, failure) == NO_DISK
    assert read_failures(tmp_path) == []
    assert "a cause; this cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_such_a_process_is_no_outcome(tmp_path, monkeypatch, make_run, strategy):
    run = make_run({"kind": "full"}, strategy=strategy, gpus=1 if strategy == "single" else 2)
    results = {"weights": tmp_path / "weights", "steps": tmp_path / "steps.csv", "outcome": tmp_path / "outcome.json"}
    paths = launching.Paths(tmp_path / "m", tmp_path / "d", tmp_path / "t", tmp_path / "work", **results)

    def ends_so(*_, **__):
        if strategy == "ddp":  # torchrun's own exit code tells nothing, so it writes a message for each silent rank
            reason = f"rank 1: {how_it_ended(NO_DISK)}"
            values = {"outcome": "error", "reason": reason, "rank": 1, "phase": "train", "step": 2, "traceback": None}
            write_json(paths.work / "failure.rank1.json", values)
        failure = launching._failure(paths.work, 1 if strategy == "ddp" else NO_DISK)
        return launching.Ended(failure)

    monkeypatch.setattr(launching, "_train", ends_so)
    monkeypatch.setattr(launching, "lease_devices", lambda *_: _NoDevices())
    with pytest.raises(UserError, match=r"could write nothing.* start again: the run resumes"):
        launching.launch(run, paths, device="cpu")
    assert not paths.outcome.exists()


class _NoDevices:
    def __enter__(self):
        return Devices("cpu")

    def __exit__(self, *_):
        return None


def test_other_exit_codes_are_failures_of_the_run():
    assert is_of_storage(how_it_ended(NO_DISK))
    assert not is_of_storage(how_it_ended(1))
    assert not is_of_storage(how_it_ended(-9))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
    ],
)
def test_a_full_device_is_out_of_memory_whoever_asked_for_some(message):
    assert describe(RuntimeError(message), rank=0, phase="train", step=3).outcome == "oom"
