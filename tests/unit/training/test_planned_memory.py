"""The planner's peak against the tracker's, of the same run trained for real in this process."""

import pytest
import torch

from tunemap.distributed.world import World
from tunemap.models.loading import read_config
from tunemap.planner import memory
from tunemap.planner.depth import with_depth
from tunemap.planner.prediction import BatchShape
from tunemap.training.assemble import assemble
from tunemap.training.batches import feed, micro_batches, schedule_of
from tunemap.training.loop import Loop

METHODS = {"full": {"kind": "full"}, "lora": {"kind": "lora"}, "qlora": {"kind": "qlora"},
           "loha": {"kind": "peft", "type": "LOHA"}, "norms": {"kind": "peft", "type": "LN_TUNING"}}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tracked(prepared, run) -> tuple[int, int]:
    """Peak bytes of the widest step, and its width."""
    from tunemap.data.tokens import load_tokens

    world, tokens = World(0, 1, torch.device("cpu")), load_tokens(prepared.tokens)
    schedule = schedule_of(run.factors, tokens, world)
    assembled = assemble(run, prepared.model, world, schedule, tokens)
    loop = Loop(
        factors=run.factors,
        precision=assembled.precision,
        schedule=schedule,
        world=world,
        label_tokens=schedule.per_step(tokens.train.label_tokens).tolist(),
        loss_of=assembled.loss_of,
        write=lambda records: None,
        window_ended=lambda state, loss: None,
    )
    batches = micro_batches(tokens, schedule, world, first_step=0)
    loop.train(assembled.state, feed(batches, world.device))
    return assembled.state.memory["peak_allocated_bytes"], int(schedule.widths.max())


@pytest.mark.parametrize(
    ("method", "factors"),
    [
        ("full", {}),
        ("lora", {"gradient_checkpointing": True}),
        ("qlora", {}),
        ("loha", {}),
        ("full", {"precision": "pure_bf16"}),
        ("full", {"precision": "bf16", "optimizer": "adafactor"}),
        ("lora", {"precision": "bf16", "optimizer": "adamw_8bit"}),
        ("norms", {"precision": "bf16"}),
    ],
)
def test_the_planned_peak_is_the_tracked_one(prepared, make_run, method, factors):
    run = make_run(METHODS[method], **factors)
    peak, width = tracked(prepared, run)
    planned = memory.account(
        run, read_config(prepared.model), BatchShape(4, width, True), num_labels=None, on_gpu=False
    )
    assert planned.peak_bytes == pytest.approx(peak, rel=0.02)
    assert sum(planned.breakdown_bytes.values()) == planned.peak_bytes == max(planned.phase_peak_bytes.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_planned_peak_of_packed_rows_is_the_tracked_one(prepared, make_run, attention):
    run = make_run(METHODS["lora"], batching="packed", attention=attention)
    peak, width = tracked(prepared, run)
    batch = BatchShape(1 if attention == "sdpa" else 4, width, padded=False, packed=True)
    planned = memory.account(run, read_config(prepared.model), batch, num_labels=None, on_gpu=False)
    assert planned.peak_bytes == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize(
    ("method", "factors"),
    [
        ("lora", {"gradient_checkpointing": True}),
        ("full", {"strategy": "fsdp", "gpus": 2}),
    ],
)
def test_a_deep_model_is_told_from_shallow_ones(prepared, make_run, method, factors):
    run, config = make_run(METHODS[method], **factors), with_depth(read_config(prepared.model), 16)
    config.layer_types = config.layer_types[:1] * 16
    batch = BatchShape(2, 16, True)
    told = memory.account(run, config, batch, num_labels=None, on_gpu=True)
    whole, _ = memory._account(run, config, batch, None, True)
    # Not to the byte, because the allocator rounds a tensor of one norm per parameter.
    assert told.breakdown_bytes == pytest.approx(whole.breakdown_bytes, abs=512)
    assert told.work == whole.work
    assert told.collectives == whole.collectives
    assert told.trainable_parameters == whole.trainable_parameters


def test_ddp_sends_its_gradients_and_keeps_buckets_of_them(prepared, make_run):
    config, batch = read_config(prepared.model), BatchShape(4, 16, False)
    single, ddp = (
        memory.account(make_run(METHODS["full"], **factors), config, batch, num_labels=None, on_gpu=False)
        for factors in ({}, {"strategy": "ddp", "gpus": 2})
    )
    gradients = 4 * single.trainable_parameters
    assert ddp.communication_bytes == gradients
    assert ddp.phase_peak_bytes["forward"] == single.phase_peak_bytes["forward"] + gradients


def test_dropout_on_a_gpu_keeps_bytes_where_a_cpu_keeps_numbers(prepared, make_run):
    config, batch = read_config(prepared.model), BatchShape(4, 16, False)
    kept = {}
    for on_gpu in (False, True):
        without, with_dropout = (
            memory.account(
                make_run({"kind": "lora", "dropout": share}), config, batch, num_labels=None, on_gpu=on_gpu
            ).phase_peak_bytes["forward"]
            for share in (0.0, 0.1)
        )
        kept[on_gpu] = with_dropout - without
    assert 0 < kept[True] < kept[False]
