"""Fixtures shared by every test: the folder of real data and traces, beside the checkout or named by a variable."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def _shared(folder: str) -> Path:
    root = Path(os.environ.get("TUNEMAP_SHARED", REPOSITORY.parent / "shared"))
    path = root / folder
    if not path.is_dir():
        pytest.skip(f"no {path}: set TUNEMAP_SHARED to the folder that holds {folder}/")
    return path


SHARED_BY_FOLDER = ("workflow",)  # folders whose tests share a costly fixture, and so one process
LONGEST_FIRST = ("workflow", "slurm", "distributed", "chaos")  # or one process would be left with them at the end


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests together that share a fixture when several processes share the suite: by folder, else by file."""
    for item in items:
        path = item.path.relative_to(REPOSITORY / "tests")
        group = path.parts[0] if path.parts[0] in SHARED_BY_FOLDER else str(path)
        item.add_marker(pytest.mark.xdist_group(group))
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
