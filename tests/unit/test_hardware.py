"""Hardware descriptions: plausible numbers, messages that help, and what this machine has."""

import os
import subprocess
import sys
import types

import pytest

from tunemap.errors import UserError
from tunemap.hardware import RESOURCES, Hardware, hardware_of_device, known_hardware, load_hardware, this_machine

EXPECTED = {
    "rtx3060", "rtx4060", "rtx4090", "t4", "l4", "l40s", "a10g", "a6000", "v100-16gb", "v100-32gb",
    "a100-40gb", "a100-80gb", "h100", "h200", "b200", "cpu",
}  # fmt: skip


def test_the_promised_devices_are_described():
    assert set(known_hardware()) == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED - {"cpu"}))
def test_a_gpus_numbers_are_plausible(name):
    gpu = load_hardware(name)
    assert gpu.kind == "gpu"
    assert 2**32 <= gpu.memory_bytes <= 2**38
    assert gpu.memory_bytes % 2**20 == 0
    assert 2e11 < gpu.bandwidth_bytes_per_s <= 8e12
    assert 1e10 < gpu.link_bytes_per_s < gpu.bandwidth_bytes_per_s
    assert 50 < gpu.power_limit_w <= 1000
    assert gpu.sources
    peaks = gpu.peak_flops_per_s
    assert set(peaks) == {"float32", "tfloat32", "bfloat16", "float16"}
    assert peaks["float32"] < peaks["float16"]
    assert peaks["bfloat16"] in (None, peaks["float16"])
    # A sparse peak entered by mistake would need more than 2.5 TFLOP/s per watt or 1,200 operations per byte.
    assert peaks["float16"] / gpu.power_limit_w < 2.6e12
    assert peaks["float16"] / gpu.bandwidth_bytes_per_s < 450


def test_dense_peaks_of_known_cards():
    assert load_hardware("a100-80gb").peak("bfloat16") == 312e12
    assert load_hardware("h100").peak("bfloat16") == 989.4e12
    assert load_hardware("rtx4090").peak("float16") == 165.2e12
    assert load_hardware("t4").peak("bfloat16") is None
    assert load_hardware("t4").peak("int4") is None


def test_a_cpus_unknown_numbers_are_null():
    cpu = load_hardware("cpu")
    assert cpu.kind == "cpu"
    assert set(cpu.peak_flops_per_s.values()) == {None}
    assert cpu.price is None
    assert cpu.memory_bytes is None


@pytest.mark.parametrize("spelling", ["A100-80GB", "a100_80gb", " a100 80GB "])
def test_spelling_is_forgiven(spelling):
    assert load_hardware(spelling).name == "a100-80gb"


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(UserError, match=r"'a100-8gb' is not described .*did you mean 'a100-80gb'.* Known: .*t4"):
        load_hardware("a100-8gb")


def test_a_name_like_nothing_gets_the_list():
    with pytest.raises(UserError, match=r"Known: a100-40gb, .*v100-32gb") as caught:
        load_hardware("zzzzzzzz")
    assert "did you mean" not in str(caught.value)


@pytest.fixture
def description(tmp_path):
    """A function that writes one changed copy of a good file and loads it."""
    good = (RESOURCES / "l4.yaml").read_text()

    def load(old, new):
        assert old in good
        (tmp_path / "l4.yaml").write_text(good.replace(old, new))
        return load_hardware("l4", tmp_path)

    return load


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: gpu", "kind: tpu", r"l4.yaml: kind: Input should be 'gpu' or 'cpu'"),
        ("power_limit_w: 72", "power_limit_w: -72", r"l4.yaml: power_limit_w: .*greater than 0"),
        ("power_limit_w: 72", "watts: 72", r"l4.yaml: (power_limit_w: Field required|watts: Extra inputs)"),
        ("  float16:", "  int4:", r"l4.yaml: peak_flops_per_s.int4"),
        ("name: l4", "name: l5", r"l4.yaml: name: 'l5' is not the name of the file, 'l4'"),
        ("kind: gpu", "kind: [gpu", r"l4.yaml: not valid YAML"),
        ("per_hour: 0.8048", "per_hour: cheap", r"l4.yaml: price.per_hour: "),
    ],
)
def test_a_broken_file_is_named_with_its_key(description, old, new, message):
    with pytest.raises(UserError, match=message):
        description(old, new)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_hardware("l4", tmp_path / "nowhere")


def test_every_gpu_is_found_by_its_drivers_name_and_no_name_is_shared():
    seen = {}
    for name in known_hardware():
        for device_name in load_hardware(name).device_names:
            assert device_name not in seen
            seen[device_name] = name
            assert hardware_of_device(device_name).name == name
    assert hardware_of_device("Voodoo 2") is None


def test_every_key_says_what_it_is():
    for name, field in Hardware.model_fields.items():
        assert field.description or name in ("kind", "price", "note", "sources"), name


# Two GPUs, in the place of nvidia-ml-py.
PAPER_DRIVER = types.SimpleNamespace(
    NVMLError=RuntimeError,
    nvmlInit=lambda: None,
    nvmlShutdown=lambda: None,
    nvmlDeviceGetCount=lambda: 2,
    nvmlDeviceGetHandleByIndex=lambda index: index,
    nvmlDeviceGetName=["Tesla T4", b"NVIDIA L4"].__getitem__,
)


def test_this_machine_lists_the_visible_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", PAPER_DRIVER)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_machine().gpus == ("Tesla T4", "NVIDIA L4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert this_machine().gpus == ("NVIDIA L4",)


def test_a_machine_without_a_driver_has_cores_and_memory(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    machine = this_machine()
    assert machine.gpus == ()
    assert machine.cores == len(os.sched_getaffinity(0))
    assert machine.memory_bytes > 2**28


def test_no_torch_is_imported(repository):
    code = (
        "import sys; from tunemap.hardware import *; this_machine(); load_hardware('t4'); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "False"
