"""Methods that decide before training: the same on every process, in every world, and after a kill."""

import json

import pytest
from safetensors.torch import load_file

from tests.distributed import ranks


def plan_of(finished):
    return finished.result["facts"]["gora"]


def weights_of(finished):
    return {path.name: path.read_bytes() for path in finished.weights.glob("*.safetensors")}


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp", 4), ("hybrid", 4)])
def test_gora_on_several_processes_plans_what_it_plans_on_one(trained, strategy, world_size):
    alone, shared = (trained("gora", *where) for where in [(), (strategy, world_size)])
    plans = plan_of(alone), plan_of(shared)
    assert plans[0]["batch_count"] == plans[1]["batch_count"] == 4
    for name, module in plans[0]["modules"].items():
        assert plans[1]["modules"][name]["rank"] == module["rank"]
        assert plans[1]["modules"][name]["importance"] == pytest.approx(module["importance"], rel=1e-5)
    assert len({module["rank"] for module in plans[0]["modules"].values()}) > 1  # else it shows nothing


@pytest.mark.parametrize(
    ("method", "strategy", "world_size"), [("gora", "single", 1), ("gora", "ddp", 2), ("adalora", "single", 1)]
)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(trained, material, tmp_path, method, strategy, world_size):
    uninterrupted = trained(method, strategy, world_size)
    run = ranks.make_run(method, strategy, world_size, checkpoint_steps=2)
    killed = ranks.train(run, material, tmp_path, sabotage={"rank": -1, "step": 5, "how": "killed"})
    assert set(killed.exit_codes) == {-9}
    resumed = ranks.train(run, material, tmp_path)
    assert "resuming after step 4" in resumed.log
    for column in ("loss", "gradient_norm"):
        assert resumed.column(column) == uninterrupted.column(column)
    assert weights_of(resumed) == weights_of(uninterrupted) != {}


def test_resumed_gora_keeps_its_plan_and_estimates_nothing(material, tmp_path):
    run = ranks.make_run("gora", checkpoint_steps=2)
    ranks.train(run, material, tmp_path, sabotage={"rank": -1, "step": 5, "how": "killed"})
    plan = json.loads((tmp_path / "work" / "gora.json").read_text())
    resumed = ranks.train(run, material, tmp_path)
    assert plan_of(resumed) == plan
    assert resumed.result["parts_s"]["estimation"] == 0 < resumed.result["earlier_parts_s"]["estimation"]
    assert plan["estimation_s"] > 0


def test_sharded_gora_saves_the_adapter_of_the_unsharded_one(trained):
    alone, sharded = (
        load_file(trained("gora", *where).weights / "adapter_model.safetensors") for where in [(), ("fsdp", 2)]
    )
    assert {name: tensor.shape for name, tensor in alone.items()} == {n: t.shape for n, t in sharded.items()}
