"""A prepared tiny model with made data, and real runs of it through the launcher."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import forked
from tunemap import corpora, models
from tunemap.config import DatasetConfig, Factors, RandomModel
from tunemap.data import sources
from tunemap.data.tokens import tokenize
from tunemap.run import Run
from tunemap.training import launch as launching
from tunemap.training.launch import Paths, launch

QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
MODEL = RandomModel(source="random", config="qwen2", tokenizer="arithmetic")
DATASET = DatasetConfig(task="arithmetic", source="made", train_rows=40, test_rows=8)
FACTORS: dict[str, Any] = {
    "per_device_batch_size": 4,
    "max_length": 96,
    "max_steps": 8,
    "epochs": None,
    "logging_steps": 4,
    "measurement_warmup_steps": 2,
    "learning_rate": 0.01,
}


@dataclass(frozen=True)
class Prepared:
    """Folders of a prepared model, its rows and their tokens."""

    model: Path
    dataset: Path
    tokens: Path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    """A random Qwen2 of 2 layers and 40 made examples; do not write to them."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "qwen2").mkdir()
    (root / "qwen2" / "config.json").write_text(json.dumps(QWEN2))
    corpora.build_arithmetic_tokenizer().save_pretrained(root / "arithmetic")
    models.prepare(MODEL, root / "model", data_root=root)
    sources.prepare(DATASET, root / "dataset", data_root=None)
    tokenize(
        root / "dataset",
        root / "model",
        root / "tokens",
        max_length=FACTORS["max_length"],
        prompt_template=None,
        system_prompt=None,
    )
    return Prepared(root / "model", root / "dataset", root / "tokens")


@pytest.fixture(name="make_run")
def make_run_fixture():
    """`make_run` for tests."""
    return make_run


def make_run(method: dict[str, Any], *, named: dict[str, Any] | None = None, **factors: Any) -> Run:
    """A run of the tiny model with the factors above, but for those given; `named`: another model and its rows."""
    return Run.model_validate(
        {
            "id": "tiny",
            "model_name": "tiny",
            "model": MODEL,
            "dataset_name": "arithmetic",
            "dataset": DATASET,
            "method_name": method["kind"],
            "method": method,
            "prompt_template": None,
            "factors": Factors(**(FACTORS | factors)),
        }
        | (named or {})
    )


@dataclass(frozen=True)
class Ended:
    """What a launched run left behind."""

    outcome: dict[str, Any]
    steps: str
    paths: Paths
    code: int

    @property
    def measurements(self) -> dict[str, Any]:
        """Its measurements."""
        return self.outcome["measurements"]

    def gate(self, name: str) -> dict[str, Any]:
        """The one gate of that name."""
        (found,) = [gate for gate in self.outcome["gates"] if gate["gate"] == name]
        return found


def run_once(
    prepared: Prepared,
    folder: Path,
    method: dict[str, Any],
    *,
    device: str = "cpu",
    ceilings: Path | None = None,
    named: dict[str, Any] | None = None,
    **factors: Any,
) -> Ended:
    """Launch a run in processes of its own, and read what it left in `folder`."""
    run = make_run(method, named=named, **factors)
    paths = Paths(
        model=prepared.model,
        dataset=prepared.dataset,
        tokens=prepared.tokens,
        work=folder / "work",
        weights=folder / "weights",
        steps=folder / "steps.csv",
        outcome=folder / "outcome.json",
        ceilings=ceilings,
    )
    code = launch(run, paths, device=device)
    return Ended(json.loads(paths.outcome.read_text()), paths.steps.read_text(), paths, code)


@pytest.fixture
def train(prepared, tmp_path):
    """Launch a run of this test."""
    return partial(run_once, prepared, tmp_path / "run")


@pytest.fixture(scope="module")
def train_once(prepared, tmp_path_factory):
    """Launch a run that the tests of a module share."""
    return partial(run_once, prepared, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def forked_workers(repository):
    """The launcher forks the worker of a run of one process, for modules that look at what workers compute."""
    forked.start_server(repository)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "subprocess", SimpleNamespace(Popen=forked.popen))
        yield
