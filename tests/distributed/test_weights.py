"""What a run saves under a strategy is what one process would have saved, and it evaluates without the strategy.

Each process of an evaluation loads the saved weights and answers its share of the batches, so no strategy reaches it.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed import ranks

LAYOUTS = [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hybrid", 4)]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_saved_weights_are_those_of_one_process(trained, method):
    (name,) = [path.name for path in trained(method).weights.glob("*.safetensors")]
    expected = load_file(trained(method).weights / name)
    for strategy, world_size in LAYOUTS:
        saved = load_file(trained(method, strategy, world_size).weights / name)
        assert saved.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(saved[key], value, rtol=1e-3, atol=1e-4, err_msg=f"{strategy} {key}")


def test_evaluation_is_the_same_for_every_strategy(trained, material, tmp_path):
    layouts = [("single", 1), *LAYOUTS]
    runs = [ranks.make_run(method, *layout) for method in ("full", "lora", "qlora") for layout in layouts]
    weights = [trained(run.method_name, run.factors.strategy, run.factors.gpus).weights for run in runs]
    runs.append(ranks.make_run("full", learning_rate=1e-2))
    weights.append(trained("full", learning_rate=1e-2).weights)
    *evaluations, other = ranks.evaluate(runs, weights, material, tmp_path / "evaluations.json")
    assert all(evaluation["n"] == len(evaluation["outputs"]) == 8 for evaluation in evaluations)
    for first in range(0, len(evaluations), len(layouts)):
        group = evaluations[first : first + len(layouts)]
        assert all(evaluation["outputs"] == group[0]["outputs"] for evaluation in group)
    assert other["outputs"] != evaluations[0]["outputs"]  # other weights answer otherwise


def test_an_adapter_names_its_modules_in_order(trained):
    """Two runs of one seed save the same bytes, whatever order sets have in their processes."""
    modules = json.loads((trained("lora").weights / "adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(modules)
    assert len(modules) == 14
