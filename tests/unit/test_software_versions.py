"""One set of versions: requirements.lock, envs/*.yaml, and what is installed here."""

import re
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = sorted((ROOT / "envs").glob("*.yaml"))


def normalised(name: str) -> str:
    """The name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines: list[str]) -> dict[str, str]:
    """Name -> version of `name==version` lines; anything else is an error."""
    found: dict[str, str] = {}
    for line in lines:
        name, equals, version = line.partition("==")
        assert equals, f"{line}: not pinned to one version"
        assert normalised(name) not in found, f"{name} occurs twice"
        found[normalised(name)] = version
    return found


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return pins([line for line in lines if line.strip() and not line.startswith("#")])


@pytest.fixture(scope="module")
def installed() -> dict[str, str]:
    """What is installed; builds such as 2.13.0+cpu count as their version.

    Of several copies the first on the path counts, as for an import: setuptools brings some and adds them at the end.
    """
    first_last = reversed(list(distributions()))
    return {normalised(found.metadata["Name"]): found.version.partition("+")[0] for found in first_last}


def test_what_is_installed_is_what_is_locked(locked, installed):
    different = {
        name: (version, installed.get(name)) for name, version in locked.items() if installed.get(name) != version
    }
    assert different == {}


def test_everything_that_the_package_needs_is_locked(locked):
    needed = [re.split(r"[ ;<>=!~\[]", requirement)[0] for requirement in requires("tunemap") or []]
    assert len(needed) > 10
    assert [name for name in needed if normalised(name) not in locked] == []


def test_there_are_environments():
    assert {path.stem for path in ENVIRONMENTS} >= {"train", "report"}


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_an_environment_has_the_locked_versions(path, locked):
    python, pip, packages = yaml.safe_load(path.read_text())["dependencies"]
    assert (python, pip) == ("python=3.11", "pip")
    chosen = pins(packages["pip"])
    assert {name: (version, locked.get(name)) for name, version in chosen.items() if locked.get(name) != version} == {}


def test_the_report_needs_no_torch():
    names = pins(yaml.safe_load((ROOT / "envs/report.yaml").read_text())["dependencies"][2]["pip"])
    assert not {"torch", "transformers", "peft", "bitsandbytes"} & set(names)


def test_the_python_of_the_environments_is_allowed():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11"' in text
