"""Fixtures shared by every test: the folder of real data and traces, beside the checkout or named by a variable."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

REPOSITORY = Path(__file__).resolve().parent.parent
# Importing the tests and what they test makes nearly a million objects, hardly any of them garbage. Walking over them
# again and again, of the collector's own accord or for each of hypothesis' examples, took an eighth of the unit tests'
# time.
gc.disable()


def _shared(folder: str) -> Path:
    root = Path(os.environ.get("TUNEMAP_SHARED", REPOSITORY.parent / "shared"))
    path = root / folder
    if not path.is_dir():
        pytest.skip(f"no {path}: set TUNEMAP_SHARED to the folder that holds {folder}/")
    return path


SHARED_BY_FOLDER = ("workflow",)  # folders whose tests share a costly fixture, and so one process
LONGEST_FIRST = ("workflow", "slurm", "distributed", "chaos")  # or one process would be left with them at the end


class ByFileOrFolder(LoadFileScheduling):  # type: ignore[misc]
    """Keeps tests together that share a fixture when several processes share the suite.

    The marks of `--dist loadgroup` would do, but pytest-xdist 3.8 writes them where pytest 9.2 no longer reads
    (https://github.com/pytest-dev/pytest-xdist/issues/1386): without a word, nothing is grouped.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        folder = file.removeprefix("tests/").partition("/")[0]
        return folder if folder in SHARED_BY_FOLDER else file


@pytest.hookimpl(optionalhook=True)  # with `-p no:xdist` there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFileOrFolder:
    """The scheduler above, whatever `--dist` says."""
    return ByFileOrFolder(config, log)


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but among new objects alone."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    folder = item.path.relative_to(REPOSITORY / "tests").parts[0]
    return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout under test."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real GSM8K, SST-2, tokenizers and model configs; skips the test where they are absent."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_traces() -> Path:
    """Real nsys, Kineto and ncu files; skips the test where they are absent."""
    return _shared("traces")
