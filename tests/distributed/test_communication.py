"""Communication and memory of a step under each strategy, against closed forms."""

import dataclasses

import pytest

from tests.distributed import ranks
from tunemap.training.steps import imbalance, summarise_steps

BYTES = 4  # of a number in fp32


def columns(finished):
    return finished.result["communication"]


def collectives(finished, rank=0):
    rows = finished.result["communication_by_rank"][rank]
    return {(row["kind"], row["group"]): row for row in rows}


def counts(finished):
    return finished.result["parameters"]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_ddp_sends_the_gradients_of_what_is_trained_and_nothing_else(trained, method):
    finished = trained(method, "ddp", 4)
    trainable_bytes = BYTES * counts(finished)["trainable"]
    assert columns(finished)["communication_bytes_per_step"] == trainable_bytes
    assert columns(finished)["all_reduce_bytes_per_step"] == trainable_bytes
    assert columns(finished)["communication_sent_bytes_per_step"] == pytest.approx(trainable_bytes * 2 * 3 / 4, abs=4)
    assert list(collectives(finished)) == [("all_reduce", "world")]


def test_accumulated_gradients_are_reduced_once(trained):
    accumulated = trained("full", "ddp", 2, gradient_checkpointing=True, gradient_accumulation=2)
    assert columns(accumulated)["all_reduce_bytes_per_step"] == BYTES * counts(accumulated)["trainable"]


def test_one_process_sends_nothing(trained):
    assert columns(trained("full")) == dict.fromkeys(columns(trained("full")), 0)


def sizes(finished):
    """Bytes of all weights, of the blocks, and of what is trained; weights of 2 blocks and a root with embeddings."""
    total = BYTES * counts(finished)["total"]
    hidden, vocabulary = ranks.ARCHITECTURE["hidden_size"], ranks.ARCHITECTURE["vocab_size"]
    return total, total - BYTES * hidden * (vocabulary + 1), BYTES * counts(finished)["trainable"]


@pytest.mark.parametrize("world_size", [2, 4])
def test_fsdp_gathers_blocks_twice_and_the_root_once(trained, world_size):
    finished = trained("full", "fsdp", world_size)
    total, blocks, trainable = sizes(finished)
    seen = collectives(finished)
    assert seen["all_gather", "world"]["payload_bytes"] == total + blocks
    assert seen["reduce_scatter", "world"]["payload_bytes"] == trainable
    assert seen["all_reduce", "world"]["payload_bytes"] < 200  # the norms of the gradients, for clipping


def test_fsdp_that_keeps_gathered_weights_gathers_everything_once_and_computes_the_same(trained):
    kept, freed = (trained("full", "fsdp", 2, **factors) for factors in ({"reshard_after_forward": False}, {}))
    total, _, _ = sizes(kept)
    assert collectives(kept)["all_gather", "world"]["payload_bytes"] == total
    assert kept.column("loss") == freed.column("loss")
    peaks = [finished.result["memory"][0]["peak_allocated_bytes"] for finished in (kept, freed)]
    assert peaks[0] > peaks[1]
    for finished in (kept, freed):
        (gate,) = [gate for gate in finished.result["gates"] if gate["gate"] == "resharding"]
        assert gate["passed"], gate["message"]


def test_fsdp_reduces_only_the_adapters_of_lora(trained):
    finished = trained("lora", "fsdp", 2)
    total, blocks, trainable = sizes(finished)
    seen = collectives(finished)
    assert seen["all_gather", "world"]["payload_bytes"] == total + blocks
    assert seen["reduce_scatter", "world"]["payload_bytes"] == trainable


def test_hybrid_shards_in_one_direction_and_replicates_in_the_other(trained):
    finished = trained("full", "hybrid", 4)
    total, blocks, trainable = sizes(finished)
    seen = collectives(finished)
    assert seen["all_gather", "shard"]["payload_bytes"] == total + blocks
    assert seen["reduce_scatter", "shard"]["payload_bytes"] == trainable
    assert seen["all_reduce", "replicate"]["payload_bytes"] == trainable / 2
    assert {row["group_size"] for row in seen.values()} == {2}


@pytest.mark.parametrize(("strategy", "world_size", "shards"), [("fsdp", 2, 2), ("fsdp", 4, 4), ("hybrid", 4, 2)])
def test_a_rank_holds_its_share_of_weights_gradients_and_states(trained, strategy, world_size, shards):
    finished = trained("full", strategy, world_size)
    total, blocks, _ = sizes(finished)
    whole = 4 * total  # weights, gradients and two moments
    gathered = total - blocks + blocks / 2  # the root, and one of two blocks
    for rank in finished.result["memory"]:
        held = sum(rank[f"{name}_bytes"] for name in ("parameters", "gradients", "optimizer"))
        assert held <= 1.02 * whole / shards + gathered
        # Between steps there are neither gradients nor gathered weights, only the batch besides.
        assert rank["end_allocated_bytes"] == pytest.approx(0.75 * whole / shards, rel=0.02, abs=8000)


def test_ddp_holds_everything_on_every_rank(trained):
    finished = trained("full", "ddp", 2)
    total, _, _ = sizes(finished)
    for rank in finished.result["memory"]:
        assert rank["parameters_bytes"] == pytest.approx(total, rel=0.02)
        assert rank["end_allocated_bytes"] == pytest.approx(4 * total, rel=0.02, abs=8000)  # gradients live in buckets


def test_imbalance_is_what_the_fullest_rank_has_beyond_the_mean(trained):
    record = trained("full", "ddp", 2).records[0]
    even = [dataclasses.replace(record, rank=rank, padded_tokens=100) for rank in range(4)]
    uneven = [*even[:3], dataclasses.replace(even[3], padded_tokens=200)]
    assert imbalance([even], "padded_tokens") == 0
    assert imbalance([uneven], "padded_tokens") == pytest.approx(200 / 125 - 1)
    assert imbalance([even, uneven], "padded_tokens") == pytest.approx(0.3)
    assert imbalance([], "padded_tokens") is None


def test_every_run_reports_the_imbalance_of_its_ranks(trained):
    several, single = (summarise_steps(trained("full", *layout).records) for layout in [("ddp", 4), ()])
    assert 0 < several["rank_tokens_imbalance"] < 3
    assert 0 < several["rank_forward_imbalance"] < 3
    assert single["rank_tokens_imbalance"] == single["rank_forward_imbalance"] == 0
