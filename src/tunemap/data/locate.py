"""Find the local files that a dataset is read from; imports nothing heavy, because planning a workflow asks it."""

from __future__ import annotations

from pathlib import Path

from tunemap.config import DatasetConfig
from tunemap.data.tasks import TASKS
from tunemap.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".tsv")  # what is read here, by the standard library
HUB_SUFFIXES = (*SUFFIXES, ".json", ".parquet", ".arrow")  # what the datasets library reads in a folder of the hub


def source_files(dataset: DatasetConfig, data_root: Path | None) -> list[Path]:
    """The local files that `prepare` reads for this dataset; none for made data and the hub.

    Raises `UserError` with the key and the path when one does not exist.
    """
    if dataset.source == "file":
        return [given_file(dataset, "train_file", data_root), given_file(dataset, "test_file", data_root)]
    if dataset.source == "local":
        folder = local_folder(dataset, data_root)
        splits = split_files(folder, dataset.task)
        return sorted(splits.values()) if splits else hub_files(folder)
    return []


def local_folder(dataset: DatasetConfig, data_root: Path | None) -> Path:
    """The folder of a dataset with source local."""
    if dataset.path is None:
        raise UserError("source local: path is missing; give the folder, relative to data_root")
    folder = _absolute(dataset.path, data_root)
    if not folder.is_dir():
        raise UserError(f"path: {folder} is no folder")
    return folder


def given_file(dataset: DatasetConfig, key: str, data_root: Path | None) -> Path:
    """The file that `train_file` or `test_file` names."""
    value = getattr(dataset, key)
    if value is None:
        raise UserError(f"source file: {key} is missing; give a {', '.join(SUFFIXES)} file")
    path = _absolute(value, data_root)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{key}: {path} is no {', '.join(SUFFIXES)} file")
    if not path.is_file():
        raise UserError(f"{key}: {path}: no such file")
    return path


def split_files(folder: Path, task: str) -> dict[str, Path]:
    """Split name -> file for a folder that holds train.* and its test split side by side; empty if it does not.

    The test split is the first that exists of the task's `test_splits`.
    """
    train = _split_file(folder, "train")
    tests = {name: path for name in TASKS[task].test_splits if (path := _split_file(folder, name))}
    if train is None or not tests:
        return {}
    name = next(iter(tests))
    return {"train": train, name: tests[name]}


def hub_files(folder: Path) -> list[Path]:
    """The data files and the card of a folder in the hub's layout."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in HUB_SUFFIXES and path.is_file())
    if not files:
        raise UserError(
            f"path: {folder} holds no data; expected train and test files ({', '.join(SUFFIXES)}) "
            f"or a folder as on the hub ({', '.join(HUB_SUFFIXES)})"
        )
    card = folder / "README.md"
    return [*files, card] if card.is_file() else files


def _split_file(folder: Path, split: str) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()), None)


def _absolute(path: str, data_root: Path | None) -> Path:
    return (data_root or Path.cwd()).expanduser() / Path(path).expanduser()
