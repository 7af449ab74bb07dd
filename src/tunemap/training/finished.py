"""Keeps what a finished run wrote until the workflow has recorded it.

Snakemake removes the outputs of a job whose end it did not see: the main process was killed, the terminal was closed,
a node went away. A run may have taken days by then. So its results lie in the run's work folder first, under one name
that appears when they are whole, and are handed to the workflow from there as hard links, which take no space. A job
that is started again for a finished run hands them over once more; the evaluation, which begins only after the
workflow has recorded the training, forgets them. The checkpoint of a run that failed stays beside them: a repetition
goes on from there.

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import damaged, read_json, sha256_of, write_json
from tunemap.measure.environment import package_digest
from tunemap.run import Run, digest
from tunemap.sources import planned_digest

SCRIPT = Path(__file__).resolve().parents[3] / "workflow" / "scripts" / "train_run.py"
FINISHED, NEXT = "finished", "finished.next"
CHECKPOINT, OLD_CHECKPOINT = "checkpoint", "checkpoint.old"  # the second while the first is being replaced
WEIGHTS, STEPS, OUTCOME, KEY, SUMS = "weights", "steps.csv", "outcome.json", "key.json", "sha256.json"
TIMESTAMP = ".snakemake_timestamp"  # what Snakemake puts into a folder that is an output


def key_of(run: Run, inputs: dict[str, Path], *, device: str) -> dict[str, str]:
    """What the results depend on: run, kind of device, source of this package, and contents of the `inputs` files."""
    contents = {name: sha256_of(path) if path.exists() else "" for name, path in inputs.items()}
    return {"digest": run.training_digest, "device": device, "source": package_digest(), **contents}


def checkpoint_identity(run: Run, inputs: dict[str, Path], *, device: str) -> str:
    """Digest of all that a step depends on, by which a checkpoint is known as this run's.

    Of the sources those of training: what else is edited while a run waits to go on does not cost its steps.
    """
    key = key_of(run, inputs, device=device)
    return digest(key | {"digest": run.steps_digest, "source": planned_digest(SCRIPT, os.environ)})


def start(work: Path) -> Path:
    """An empty folder in which the results of a run are put together."""
    folder = work / NEXT
    shutil.rmtree(folder, ignore_errors=True)
    (folder / WEIGHTS).mkdir(parents=True)
    return folder


def keep(work: Path, key: dict[str, str], *, resumable: bool = False) -> None:
    """Declare the results in `start`'s folder whole; all else in the work folder has served its purpose.

    Unless the run is `resumable`: its checkpoint and the records of its steps stay then.
    """
    folder = work / NEXT
    write_json(folder / SUMS, checksums(folder))
    write_json(folder / KEY, key)
    shutil.rmtree(work / FINISHED, ignore_errors=True)
    folder.rename(work / FINISHED)
    for path in work.iterdir():
        if path.name != FINISHED and not resumable:
            _remove(path)


def hand_over(work: Path, key: dict[str, str], *, weights: Path, steps: Path, outcome: Path) -> dict[str, Any] | None:
    """Put kept results in their places and return the outcome; None if there are none for this very `key`.

    Results of another configuration, source or data are removed: they are of no use. Those that are not as they were
    written are set aside.
    """
    folder = work / FINISHED
    if not folder.exists():
        return None
    if not _is_of(folder, key):
        shutil.rmtree(folder)
        return None
    if not _is_whole(folder):
        print(f"the kept results of this run changed after they were written: {damaged(folder, 'training anew')}")
        return None
    result: dict[str, Any] = read_json(folder / OUTCOME)
    _remove(weights)
    _link_folder(folder / WEIGHTS, weights)
    for name, destination in ((STEPS, steps), (OUTCOME, outcome)):  # the outcome last: it says that all is there
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.unlink(missing_ok=True)
        _link(folder / name, destination)
    return result


def has_checkpoint(work: Path) -> bool:
    """Whether a repetition of the run could go on from somewhere."""
    return any((work / name).exists() for name in (CHECKPOINT, OLD_CHECKPOINT))


def forget(work: Path) -> None:
    """Remove kept results: the workflow has recorded them, or a repetition is to make others."""
    for name in (FINISHED, NEXT):
        shutil.rmtree(work / name, ignore_errors=True)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def _is_of(folder: Path, key: dict[str, str]) -> bool:
    try:
        return bool(read_json(folder / KEY) == key)
    except UserError:
        return False


def _is_whole(folder: Path) -> bool:
    try:
        return bool(read_json(folder / SUMS) == checksums(folder))
    except UserError:
        return False


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder by its name there, those about the folder itself left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (KEY, SUMS, TIMESTAMP))
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(files)}


def _link_folder(source: Path, destination: Path) -> None:
    """The same for a folder; `shutil.copytree` would hide what the disk says in a list of its own."""
    destination.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _link_folder(path, destination / path.name)
        else:
            _link(path, destination / path.name)


def _link(source: Path, destination: Path) -> None:
    """A second name for the file; a copy where the file system or its border does not allow that."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
    os.utime(destination)  # results are as new as the job that delivers them, or the workflow would think them stale


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
