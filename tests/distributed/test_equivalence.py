"""Every strategy computes what one process computes on the same global batches."""

import numpy as np
import pytest

STRATEGIES = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hybrid", 4)]
VARIANTS = [{}, {"gradient_checkpointing": True, "gradient_accumulation": 2}]


def assert_same_trajectory(finished, reference):
    expected = reference.column("loss")
    assert len(expected) == 6
    assert expected[-1] < 0.985 * expected[0]  # it learns, so that equal losses mean equal updates
    np.testing.assert_allclose(finished.column("loss"), expected, rtol=1e-5)
    np.testing.assert_allclose(finished.column("gradient_norm"), reference.column("gradient_norm"), rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "checkpointed-accumulated"])
@pytest.mark.parametrize(("strategy", "world_size"), STRATEGIES)
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "gora"])
def test_losses_are_those_of_one_process(trained, method, strategy, world_size, variant):
    assert_same_trajectory(trained(method, strategy, world_size, **variant), trained(method))


@pytest.mark.parametrize(
    ("method", "strategy", "world_size"),
    [("full", "single", 1), ("lora", "single", 1), ("full", "ddp", 2), ("full", "fsdp", 2), ("lora", "hybrid", 4)],
)
def test_logits_of_label_tokens_alone_give_the_same_trajectory(trained, method, strategy, world_size):
    finished = trained(method, strategy, world_size, logits="label_tokens")
    assert_same_trajectory(finished, trained(method))
    assert [gate["passed"] for gate in finished.result["gates"] if gate["gate"] == "flops"] == [True]


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_packed_documents_give_the_same_trajectory_with_and_without_a_mask(trained, strategy, world_size):
    """By document each rank has its documents in one row; under a mask they are padded rows."""
    finished = trained("lora", strategy, world_size, batching="packed")
    assert_same_trajectory(finished, trained("lora", batching="packed", attention="eager"))
    assert {gate["gate"]: gate["passed"] for gate in finished.result["gates"]}["documents_apart"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hybrid"])
def test_every_strategy_runs_on_one_device_as_the_baseline_of_scaling(trained, strategy):
    alone = trained("lora", strategy, 1)
    assert_same_trajectory(alone, trained("lora"))
    assert set(alone.result["communication"].values()) == {0}


@pytest.mark.parametrize(
    ("strategy", "world_size", "optimizer"),
    [
        ("ddp", 2, "adamw_8bit"),
        ("ddp", 2, "paged_adamw"),
        ("fsdp", 2, "adamw_8bit"),
        ("fsdp", 2, "paged_adamw"),
        ("fsdp", 2, "paged_adamw_8bit"),
        ("hybrid", 4, "adamw_8bit"),
    ],
)
def test_bitsandbytes_optimizers_run_under_every_strategy(trained, strategy, world_size, optimizer):
    finished = trained("full", strategy, world_size, optimizer=optimizer)
    # 8-bit states are quantised in blocks, which sharding cuts elsewhere.
    np.testing.assert_allclose(
        finished.column("loss"),
        trained("full", optimizer=optimizer).column("loss"),
        rtol=1e-3 if "8bit" in optimizer else 1e-5,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_gradients_of_fp16_are_scaled_under_sharding(trained, optimizer):
    settings = {"precision": "fp16", "optimizer": optimizer, "learning_rate": 1e-2}
    finished, alone = trained("lora", "fsdp", 2, **settings), trained("lora", **settings)
    np.testing.assert_allclose(finished.column("loss"), alone.column("loss"), rtol=1e-3)
    np.testing.assert_allclose(finished.column("gradient_norm"), alone.column("gradient_norm"), rtol=1e-2)


def test_clipping_uses_the_norm_of_all_shards(trained):
    clipped = {"max_grad_norm": 0.05}
    assert_same_trajectory(trained("full", "fsdp", 4, **clipped), trained("full", **clipped))
    assert trained("full", **clipped).column("loss") != trained("full").column("loss")
