"""The driver's counters: the right GPU is asked, and what is not known is empty."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from tunemap.measure.nvml import ask, driver_process_bytes, handle_of, nvml, process_bytes_by_pid, visible_handles


def process(pid, used):
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def test_without_a_driver_every_answer_is_empty(no_driver):
    with nvml() as library:
        assert library is None
    assert process_bytes_by_pid("cuda:0") == {}
    assert driver_process_bytes("cuda:0") is None


def test_without_the_library_every_answer_is_empty(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with nvml() as library:
        assert library is None


def test_the_session_is_closed_after_an_error(driver):
    with pytest.raises(KeyError), nvml() as library:
        raise KeyError(library)
    assert driver.open == 0


def test_an_unsupported_question_is_none(driver):
    with nvml() as library:
        assert ask(library, "nvmlDeviceGetSomethingNew", 0) is None


def test_processes_are_told_apart_and_unknown_amounts_left_out(driver):
    running = {0: [process(11, 100), process(os.getpid(), 300), process(13, None)], 1: []}
    driver.answers["nvmlDeviceGetComputeRunningProcesses"] = running.get
    assert process_bytes_by_pid("cuda:0") == {11: 100, os.getpid(): 300}
    assert driver_process_bytes("cuda:0") == 300
    assert driver_process_bytes("cuda", pid=11) == 100
    assert driver_process_bytes("cuda:1") is None
    assert driver_process_bytes("cpu") is None
    assert driver_process_bytes("cuda:7") is None


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, [0, 1]),
        ("1", [1]),
        ("1,0", [1, 0]),
        ("", []),
        ("-1", []),
        ("1,5,0", [1]),
        ("GPU-bbbb", [1]),
        ("GPU-cccc,0", []),
    ],
)
def test_cuda_visible_devices_decides_which_gpu_is_asked(driver, monkeypatch, variable, expected):
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    with nvml() as library:
        assert visible_handles(library) == expected
        assert handle_of(library, "cuda:0") == (expected[0] if expected else None)
        assert handle_of(library, "cpu") is None


def test_a_running_torch_names_its_gpu_itself(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="bbbb"))
    with nvml() as library:
        assert handle_of(library, torch.device("cuda:0")) == 1
