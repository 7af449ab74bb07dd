"""A killed run goes on as if nothing had happened, under every strategy."""

import hashlib

import pytest

from tests.distributed import ranks
from tunemap.files import read_sealed, write_sealed
from tunemap.training import launch, steps

LAYOUTS = [("single", 1), ("ddp", 2), ("fsdp", 2), ("hybrid", 4)]
# Dropout shows that each rank's random generator is restored, 8-bit states that those are.
KINDS = {
    "full": ("full", {"optimizer": "adamw_8bit"}),
    "lora": ("lora", {"parameters": {"dropout": 0.1}}),
    "qlora": ("qlora", {}),
}


def kill_and_resume(run, material, folder):
    killed = ranks.train(run, material, folder, sabotage={"rank": -1, "step": 5, "how": "killed"})
    assert killed.exit_codes == [-9] * run.factors.gpus
    return ranks.train(run, material, folder)


def weights_of(finished):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in finished.weights.glob("*.safetensors")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("strategy", "world_size"), LAYOUTS)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(trained, material, tmp_path, strategy, world_size, kind):
    method, settings = KINDS[kind]
    uninterrupted = trained(method, strategy, world_size, **settings)
    run = ranks.make_run(method, strategy, world_size, checkpoint_steps=2, **settings)
    resumed = kill_and_resume(run, material, tmp_path)
    assert "resuming after step 4" in resumed.log
    for column in ("loss", "gradient_norm"):
        assert resumed.column(column) == uninterrupted.column(column)
    assert weights_of(resumed) == weights_of(uninterrupted) != {}


def test_a_resumed_run_has_the_times_of_all_its_steps(material, tmp_path):
    resumed = kill_and_resume(ranks.make_run("full", checkpoint_steps=2), material, tmp_path)
    own, earlier = resumed.result["parts_s"], resumed.result["earlier_parts_s"]
    taken = [record.step_time_s + record.data_time_s for record in resumed.records]
    assert len(taken) == 6
    assert earlier["training"] > sum(taken[:4])
    measurements = launch._from_result(resumed.result, [])
    assert measurements["train_time_s"] == own["training"] + earlier["training"] > sum(taken)
    assert measurements["wall_time_s"] == pytest.approx(sum(own.values()) + sum(earlier.values()))


def test_times_of_two_machines_are_not_averaged(material, tmp_path):
    run = ranks.make_run("full", "ddp", 2, checkpoint_steps=2)
    ranks.train(run, material, tmp_path, sabotage={"rank": -1, "step": 5, "how": "killed"})
    path = tmp_path / "work" / "checkpoint" / "manifest.json"
    manifest = read_sealed(path)
    write_sealed(path, manifest | {"machines": [manifest["machines"][0], "another"]})
    resumed = ranks.train(run, material, tmp_path)
    assert resumed.column("measured") == [0, 1, 0, 1, 0, 1]  # of this machine; the tracker and the first step are not
    assert steps.measured_steps(resumed.records) == [5]


@pytest.mark.parametrize(
    ("strategy", "world_size", "settings"),
    [
        ("single", 1, {"optimizer": "galore_adamw", "galore_rank": 4, "galore_update_steps": 3}),
        ("ddp", 2, {"optimizer": "galore_adamw", "galore_rank": 4, "galore_update_steps": 3}),
        ("single", 1, {"optimizer": "lomo", "max_grad_norm": None, "learning_rate": 0.3}),
        ("single", 1, {"optimizer": "adalomo", "max_grad_norm": None, "learning_rate": 0.03}),
    ],
    ids=lambda value: value["optimizer"] if isinstance(value, dict) else None,
)
def test_frugal_optimizers_train_and_resume_bit_for_bit(trained, material, tmp_path, strategy, world_size, settings):
    uninterrupted = trained("full", strategy, world_size, **settings)
    losses = uninterrupted.column("loss")
    assert losses[-1] < 0.985 * losses[0]
    gates = {gate["gate"]: gate for gate in uninterrupted.result["gates"]}
    assert [name for name, gate in gates.items() if gate["fatal"] and not gate["passed"]] == []
    assert world_size == 1 or "replicas" in gates
    resumed = kill_and_resume(
        ranks.make_run("full", strategy, world_size, checkpoint_steps=2, **settings), material, tmp_path
    )
    for column in ("loss", "gradient_norm"):
        assert resumed.column(column) == uninterrupted.column(column)
    assert weights_of(resumed) == weights_of(uninterrupted) != {}


def test_gradient_scaler_goes_on_where_it_was(trained, material, tmp_path):
    settings = {"precision": "fp16", "optimizer": "paged_adamw_8bit"}
    run = ranks.make_run("lora", "fsdp", 2, checkpoint_steps=2, **settings)
    resumed = kill_and_resume(run, material, tmp_path)
    assert resumed.column("loss") == trained("lora", "fsdp", 2, **settings).column("loss")


@pytest.mark.parametrize("other", [1, 4])
def test_another_number_of_processes_than_the_run_asks_for_is_refused(material, tmp_path, other):
    run = ranks.make_run("full", "ddp", 2)
    refused = ranks.train(run, material, tmp_path, world_size=other)
    assert refused.exit_codes == [1] * other
    message = f"the run asks for 2 processes (factor gpus), {other} were started"
    assert {failure["reason"] for failure in refused.failures} == {message}


def test_checkpoint_of_another_configuration_is_not_used(material, tmp_path):
    first = ranks.make_run("full", "ddp", 2, checkpoint_steps=2)
    ranks.train(first, material, tmp_path, sabotage={"rank": -1, "step": 5, "how": "killed"})
    other = ranks.make_run("full", "fsdp", 2, checkpoint_steps=2)
    finished = ranks.train(other, material, tmp_path)
    assert "version of the trainer (ddp on 2 devices)" in finished.log
    assert len(finished.column("loss")) == 6


def test_damaged_checkpoint_is_set_aside(trained, material, tmp_path):
    run = ranks.make_run("full", "ddp", 2, checkpoint_steps=2)
    ranks.train(run, material, tmp_path, sabotage={"rank": -1, "step": 5, "how": "killed"})
    shard = tmp_path / "work" / "checkpoint" / "rank1.pt"
    shard.write_bytes(shard.read_bytes()[:-1])
    finished = ranks.train(run, material, tmp_path)
    assert "rank1.pt of the checkpoint is damaged" in finished.log
    assert (tmp_path / "work" / "checkpoint.corrupt" / "rank1.pt").exists()
    assert finished.column("loss") == trained("full", "ddp", 2).column("loss")
