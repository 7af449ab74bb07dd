"""The same instruments on a real CUDA device; skipped where there is none."""

import os
import time

import pytest
import torch

from tunemap.measure.ceiling import measure_ceiling
from tunemap.measure.clock import StepClock
from tunemap.measure.energy import EnergyWindow
from tunemap.measure.environment import device_fingerprint, device_state
from tunemap.measure.memory import memory_record, reset_peaks, track_live_storage
from tunemap.measure.nvml import process_bytes_by_pid

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda:0"


def work(seconds):
    """Products that keep the device busy for about `seconds`, launched without waiting."""
    matrix = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    start = time.perf_counter()
    matrix @ matrix
    torch.cuda.synchronize()
    for _ in range(max(1, round(seconds / (time.perf_counter() - start)))):
        matrix @ matrix


def test_event_times_agree_with_the_host_clock_around_a_synchronised_step():
    work(0.05)
    torch.cuda.synchronize()
    clock = StepClock(DEVICE)
    start = time.perf_counter()
    clock.begin(0)
    time.sleep(0.1)
    clock.mark("data")
    work(0.3)
    clock.mark("forward")
    clock.end()
    (record,) = clock.flush()
    wall = time.perf_counter() - start
    assert record.step_time_s + record.data_time_s == pytest.approx(wall, rel=0.02)
    assert record.data_time_s == pytest.approx(0.1, abs=0.01)


def test_the_tracker_in_blocks_of_512_bytes_equals_the_allocator():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(300, 300, bias=False) for _ in range(4)]
    model = torch.nn.Sequential(*layers).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = torch.randn(64, 300, device=DEVICE)

    def step():
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    reset_peaks(DEVICE)
    start = torch.cuda.memory_allocated()
    with track_live_storage(model, optimizer, block_bytes=512) as tracker:
        step()
    above_start = torch.cuda.max_memory_allocated() - start
    assert tracker.peak_allocated_bytes - tracker.end_allocated_bytes == pytest.approx(above_start, rel=0.02)
    record = memory_record(DEVICE, tracker)
    assert record.peak_allocated_bytes <= record.peak_reserved_bytes


def test_the_driver_describes_the_device_that_torch_uses():
    state = device_state(DEVICE)
    assert state["name"] == torch.cuda.get_device_name(0)
    assert len(device_fingerprint(DEVICE)) == 16
    known = process_bytes_by_pid(DEVICE)
    assert known.get(os.getpid(), 1) > 0


def test_energy_lies_between_nothing_and_the_power_limit():
    with EnergyWindow([DEVICE]) as window:
        work(2.0)
        torch.cuda.synchronize()
    reading = window.reading
    if reading.energy_joules is None:
        pytest.skip("this GPU has no energy counter")
    assert 0 < reading.energy_joules < 1.2 * reading.power_limit_joules


def test_the_ceiling_is_reached_in_a_few_seconds():
    start = time.perf_counter()
    ceiling = measure_ceiling(DEVICE, "float16")
    assert time.perf_counter() - start < 20
    assert ceiling.flops_per_s > 1e12
