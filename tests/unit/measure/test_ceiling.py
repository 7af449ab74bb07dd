"""The measured matmul ceiling: plausible, bounded in time, kept per device."""

import argparse
import functools
import time

import pytest
import torch

from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.measure import ceiling as ceiling_module
from tunemap.measure.ceiling import Ceiling, add_ceiling_arguments, load, measure_ceiling, run_ceiling, store

torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ceiling_module, "_SIZES", {"cpu": (128, 256)})


def test_the_ceiling_is_a_product_that_was_really_done(small):
    ceiling = measure_ceiling("cpu", "float32", limit_s=0.2)
    left = torch.randn(ceiling.size, ceiling.size)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        left @ left
        times.append(time.perf_counter() - start)
    here = 2 * ceiling.size**3 / min(times)
    assert here / 3 < ceiling.flops_per_s < here * 3
    assert ceiling.repeats >= 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measuring_is_bounded(small, dtype):
    start = time.perf_counter()
    ceiling = measure_ceiling("cpu", dtype, limit_s=0.3)
    assert time.perf_counter() - start < 3
    assert ceiling.dtype == dtype


def test_the_precision_setting_is_left_as_it_was(small):
    torch.set_float32_matmul_precision("high")
    try:
        measure_ceiling("cpu", "float32", limit_s=0.02)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_stored_ceilings_come_back_by_device_and_dtype(tmp_path, monkeypatch):
    path = tmp_path / "ceiling.json"
    assert load(path, "cpu") == {}
    single, half = Ceiling("float32", 1e12, 1024, 5), Ceiling("bfloat16", 2e12, 2048, 7)
    store(path, "cpu", single)
    store(path, "cpu", half)
    assert load(path, "cpu") == {"float32": single, "bfloat16": half}
    monkeypatch.setattr(ceiling_module, "device_fingerprint", lambda device: "another")
    assert load(path, "cpu") == {}
    store(path, "cpu", half)
    monkeypatch.undo()
    assert load(path, "cpu")["float32"] == single
    assert [entry["device"] for entry in read_json(path).values()] == ["cpu", "cpu"]


def test_an_unknown_dtype_names_the_allowed_ones():
    with pytest.raises(UserError, match=r"'int4'.*float32, tfloat32, bfloat16, float16"):
        measure_ceiling("cpu", "int4")


def test_tensor_float_is_refused_on_a_cpu():
    with pytest.raises(UserError, match="CUDA devices only"):
        measure_ceiling("cpu", "tfloat32")


@pytest.fixture
def command(small, monkeypatch, tmp_path):
    """Run `tunemap ceiling` with short measurements; returns the exit code and where the ceilings are."""
    quick = functools.partial(measure_ceiling, limit_s=0.02)
    monkeypatch.setattr(ceiling_module, "measure_ceiling", quick)

    def command(*arguments):
        parser = argparse.ArgumentParser()
        add_ceiling_arguments(parser)
        output = tmp_path / "shared" / "ceilings.json"
        return run_ceiling(parser.parse_args(["--output", str(output), *arguments])), output

    return command


def test_the_command_stores_every_dtype_of_the_device(command, capsys):
    code, output = command("--device", "cpu")
    assert code == 0
    assert set(load(output, "cpu")) >= {"float32", "bfloat16"}
    assert "tfloat32" not in load(output, "cpu")
    assert "TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "cuda:x"])
def test_a_device_that_is_not_there_is_named(command, device):
    with pytest.raises(UserError, match=f"--device {device}: "):
        command("--device", device)


def test_no_threads_are_refused(command):
    with pytest.raises(UserError, match="--threads 0: allowed are 1 and more"):
        command("--threads", "0")
