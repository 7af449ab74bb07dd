"""Probes of `tunemap max-batch`: a few real steps at the widest batch."""

import pytest

from tunemap.errors import UserError
from tunemap.planner.device import Target
from tunemap.planner.largest import probe_run

CPU = Target("cpu", on_gpu=False, memory_bytes=1 << 33, hardware=None)


def test_a_probe_trains_at_the_widest_batch_and_tells_the_peak(prepared, make_run, tmp_path, capfd):
    run = make_run({"kind": "lora"})
    folders = {
        f"models/{run.model_key}": prepared.model,
        f"datasets/{run.dataset_key}": prepared.dataset,
        f"tokens/{run.tokens_key}": prepared.tokens,
    }
    for name, folder in folders.items():
        (tmp_path / "shared" / name).parent.mkdir(parents=True)
        (tmp_path / "shared" / name).symlink_to(folder)
    probe = probe_run(run, "per_device_batch_size", 7, CPU, results=tmp_path, device_kind="cpu")
    assert (probe.value, probe.outcome, probe.held) == (7, "ok", True)
    assert 1 << 28 < probe.peak_bytes < 1 << 32
    assert capfd.readouterr().out == ""  # for the answer alone


def test_a_probe_says_what_must_be_prepared_first(make_run, tmp_path):
    run = make_run({"kind": "lora"})
    with pytest.raises(UserError, match=r"the model of tiny is not in .*: snakemake .* prepares it"):
        probe_run(run, "per_device_batch_size", 1, CPU, results=tmp_path, device_kind="cpu")
