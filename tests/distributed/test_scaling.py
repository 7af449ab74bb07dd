"""Speed-up and efficiency from table rows, against numbers worked out by hand."""

import math

import pytest

from tunemap.config import Factors
from tunemap.distributed.scaling import global_batch_size, scaling_rows


def row(gpus, tokens_per_second, *, seed=0, outcome="ok", method="lora", **factors):
    values = Factors(strategy="ddp", gpus=gpus, seed=seed).model_dump() | factors
    measured = {"tokens_per_second": tokens_per_second, "peak_allocated_bytes": 1000.0 / gpus}
    measured["communication_bytes_per_step"] = 0 if gpus == 1 else 64
    names = {"model": "m", "dataset": "d", "method": method, "method_kind": method, "method.dropout": 0.0, "rank": 8}
    return names | values | measured | {"outcome": outcome, "run": f"{gpus}-{seed}-{outcome}"}


def by_gpus(rows, mode="weak", **wanted):
    return {r.gpus: r for r in rows if r.mode == mode and all(getattr(r, k) == v for k, v in wanted.items())}


def test_weak_scaling_keeps_the_batch_of_each_device():
    found = by_gpus(scaling_rows([row(1, 100.0), row(2, 180.0), row(4, 300.0), row(4, 50.0, per_device_batch_size=2)]))
    assert [found[n].speed_up for n in (1, 2, 4)] == pytest.approx([1.0, 1.8, 3.0])
    assert [found[n].efficiency for n in (1, 2, 4)] == pytest.approx([1.0, 0.9, 0.75])
    assert found[4].peak_allocated_bytes == 250
    assert found[4].communication_bytes_per_step == 64
    assert found[4].speed_up_low is None  # one repeat has no interval


def test_strong_scaling_keeps_the_global_batch():
    rows = [row(gpus, 100.0 * gpus**0.5, per_device_batch_size=16 // gpus) for gpus in (1, 2, 4)]
    rows.append(row(4, 999.0, per_device_batch_size=16))
    found = scaling_rows(rows)
    strong = by_gpus(found, "strong")
    assert [strong[n].efficiency for n in (1, 2, 4)] == pytest.approx([1.0, 2**-0.5, 0.5])
    assert {global_batch_size(one) for one in rows[:3]} == {16}
    weak = by_gpus(found, "weak")  # the pair with 16 examples per device
    assert sorted(weak) == [1, 4]
    assert weak[4].speed_up == pytest.approx(9.99)


def test_accumulation_counts_as_batch():
    accumulated = row(1, 100.0, per_device_batch_size=4, gradient_accumulation=4)
    strong = by_gpus(scaling_rows([accumulated, row(4, 360.0, per_device_batch_size=4)]), "strong")
    assert strong[4].efficiency == pytest.approx(0.9)


def test_of_two_ways_to_run_on_one_device_the_one_with_more_repeats_is_the_baseline():
    at_once = [row(1, 100.0, per_device_batch_size=16, seed=seed) for seed in (0, 1)]
    accumulated = row(1, 50.0, per_device_batch_size=4, gradient_accumulation=4)
    found = scaling_rows([accumulated, *at_once, row(4, 200.0, per_device_batch_size=4)])
    speed_ups = {(r.gpus, r.gradient_accumulation): r.speed_up for r in found if r.mode == "strong"}
    assert speed_ups == pytest.approx({(1, 1): 1.0, (1, 4): 0.5, (4, 1): 2.0})


def test_interval_is_that_of_the_ratio_of_repeats():
    ones, twos = [100.0, 102.0, 98.0], [190.0, 200.0, 195.0]
    rows = [row(1, v, seed=s) for s, v in enumerate(ones)] + [row(2, v, seed=s) for s, v in enumerate(twos)]
    two = by_gpus(scaling_rows(rows))[2]
    assert two.runs == 3
    assert two.speed_up == pytest.approx(math.prod(twos) ** (1 / 3) / math.prod(ones) ** (1 / 3))
    assert two.speed_up_low < two.speed_up < two.speed_up_high
    assert two.efficiency_high == pytest.approx(two.speed_up_high / 2)
    assert two.tokens_per_second == pytest.approx(math.prod(twos) ** (1 / 3))


def test_baseline_is_of_the_same_strategy_and_method():
    rows = [row(1, 100.0), row(2, 150.0, strategy="fsdp"), row(4, 200.0, strategy="fsdp"), row(4, 1.0, method="full")]
    found = scaling_rows(rows)
    assert {r.strategy for r in found} == {"fsdp"}
    assert all(r.speed_up is None for r in found)
    assert {r.reason for r in found} == {"no run of fsdp on one device with this batch ended well"}


def test_failed_runs_give_no_numbers_but_a_reason():
    found = by_gpus(scaling_rows([row(1, 100.0), row(2, float("nan"), outcome="oom")]))
    assert (found[2].runs, found[2].tokens_per_second, found[2].speed_up) == (0, None, None)
    assert found[2].reason == "no run ended well: oom"


def test_a_row_knows_its_own_runs_and_no_run_of_other_factors():
    rows = [row(n, 100.0 * n, rank=rank) | {"run": f"{n}-{rank}"} for n in (1, 2) for rank in (8, 16)]
    rows.append(row(2, float("nan"), seed=1, outcome="oom", rank=16) | {"run": "late"})
    found = {(r.curve, r.gpus): (r.run_ids, r.runs, r.failed) for r in scaling_rows(rows)}
    assert found == {
        ("lora · ddp · rank 8", 1): ("1-8", 1, 0),
        ("lora · ddp · rank 8", 2): ("2-8", 1, 0),
        ("lora · ddp · rank 16", 1): ("1-16", 1, 0),
        ("lora · ddp · rank 16", 2): ("2-16;late", 1, 1),
    }


def test_curves_are_called_by_what_differs_between_them():
    rows = [
        row(n, 100.0 * n, method=m, max_length=length) for n in (1, 2) for m in ("full", "lora") for length in (64, 96)
    ]
    rows = [one for one in rows if (one["method"], one["max_length"]) != ("full", 96)]
    assert list(dict.fromkeys(r.curve for r in scaling_rows(rows))) == [
        "full · ddp", "lora · ddp · max length 64", "lora · ddp · max length 96",
    ]  # fmt: skip


def test_learning_rate_may_follow_the_batch_and_empty_cells_are_equal():
    first = row(1, 100.0) | {"max_grad_norm": float("nan")}
    second = row(2, 200.0, learning_rate=2e-4) | {"max_grad_norm": None}
    assert by_gpus(scaling_rows([first, second]))[2].efficiency == pytest.approx(1.0)


def test_one_number_of_devices_is_no_curve():
    assert scaling_rows([row(2, 100.0), row(2, 101.0, seed=1)]) == []
