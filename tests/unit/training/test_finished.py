"""Results of a finished run survive until the workflow has recorded them, and are never taken for another run's."""

import errno
import os

import pytest

from tunemap.files import write_json
from tunemap.training import finished

KEY = {"digest": "a", "source": "b", "model": "c"}


@pytest.fixture
def kept(tmp_path):
    """A work folder with kept results, and where they are to go."""
    work = tmp_path / "work"
    (work / "checkpoint").mkdir(parents=True)
    folder = finished.start(work)
    (folder / finished.WEIGHTS / "model.safetensors").write_bytes(b"weights")
    (folder / finished.STEPS).write_text("rank,step\n")
    write_json(folder / finished.OUTCOME, {"outcome": "ok"})
    finished.keep(work, KEY)
    places = {name: tmp_path / "run" / name for name in ("weights", "steps", "outcome")}
    return work, places


def test_kept_results_are_handed_over_as_often_as_asked(kept):
    work, places = kept
    for _ in range(2):
        assert finished.hand_over(work, KEY, **places) == {"outcome": "ok"}
        assert (places["weights"] / "model.safetensors").read_bytes() == b"weights"
        assert places["steps"].read_text() == "rank,step\n"
        for path in places["weights"].iterdir():  # what Snakemake does with the outputs of an unfinished job
            path.unlink()


def test_kept_results_take_no_space(kept):
    work, places = kept
    finished.hand_over(work, KEY, **places)
    inside = work / finished.FINISHED / finished.WEIGHTS / "model.safetensors"
    assert inside.samefile(places["weights"] / "model.safetensors")


def test_only_results_stay_once_a_run_has_finished(kept):
    work, _ = kept
    assert [path.name for path in work.iterdir()] == [finished.FINISHED]


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint.old", None])
def test_a_checkpoint_that_was_being_replaced_counts(tmp_path, name):
    if name:
        (tmp_path / name).mkdir()
    assert finished.has_checkpoint(tmp_path) is (name is not None)


def test_the_checkpoint_of_a_failed_run_outlives_its_results(kept):
    work, _ = kept
    (work / "checkpoint").mkdir()
    finished.start(work)
    finished.keep(work, KEY, resumable=True)
    finished.forget(work)
    assert [path.name for path in work.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("changed", list(KEY))
def test_results_of_another_configuration_source_or_input_are_not_taken_over(kept, changed):
    work, places = kept
    assert finished.hand_over(work, KEY | {changed: "other"}, **places) is None
    assert not places["outcome"].exists()
    assert not (work / finished.FINISHED).exists()


@pytest.mark.parametrize("name", [finished.STEPS, f"{finished.WEIGHTS}/model.safetensors", finished.KEY])
def test_incomplete_results_are_not_taken_over(kept, name):
    work, places = kept
    (work / finished.FINISHED / name).write_bytes(b"")
    assert finished.hand_over(work, KEY, **places) is None


def test_results_that_were_never_declared_whole_are_not_taken_over(tmp_path):
    finished.start(tmp_path)
    assert finished.hand_over(tmp_path, KEY, weights=tmp_path, steps=tmp_path, outcome=tmp_path) is None


def test_recorded_results_are_forgotten_and_the_workflow_keeps_them(kept):
    work, places = kept
    finished.hand_over(work, KEY, **places)
    finished.forget(work)
    assert not work.exists()
    assert (places["weights"] / "model.safetensors").read_bytes() == b"weights"


def test_another_prepared_model_or_kind_of_device_changes_the_key(tmp_path, make_run):
    run, model = make_run({"kind": "full"}), tmp_path / "model.json"
    first = finished.key_of(run, {"model": model}, device="cpu")
    assert finished.key_of(run, {"model": model}, device="cuda") != first
    model.write_text("{}")
    assert finished.key_of(run, {"model": model}, device="cpu") != first
    assert first["digest"] == run.training_digest


def test_a_checkpoint_is_known_by_what_its_steps_depend_on(tmp_path, make_run):
    model = tmp_path / "model.json"

    def identity(device="cpu", **factors):
        return finished.checkpoint_identity(make_run({"kind": "full"}, **factors), {"model": model}, device=device)

    first = identity()
    assert identity(time_limit_minutes=90, checkpoint_steps=7, logging_steps=2) == first
    others = {identity(device="cuda"), identity(learning_rate=0.5), identity(measurement_warmup_steps=1)}
    model.write_text("{}")
    assert len(others | {first, identity()}) == 5


def test_what_snakemake_puts_into_a_folder_is_not_part_of_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = finished.checksums(tmp_path)
    (tmp_path / ".snakemake_timestamp").touch()
    assert finished.checksums(tmp_path) == before


def test_a_disk_that_refuses_the_hand_over_says_why_by_itself(kept, monkeypatch):
    """`shutil` wraps it in an error without a number, of which nobody could make a message."""
    work, places = kept

    def refuse(*arguments, **_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[1]))

    monkeypatch.setattr(finished.os, "link", refuse)
    monkeypatch.setattr(finished.shutil, "copy2", refuse)
    with pytest.raises(OSError, match="Read-only file system") as caught:
        finished.hand_over(work, KEY, **places)
    assert caught.value.errno == errno.EROFS
