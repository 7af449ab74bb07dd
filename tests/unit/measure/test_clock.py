"""The step clock and the parts timer: sums, identities, and no synchronisation inside a window."""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunemap.measure import clock as clock_module
from tunemap.measure.clock import PARTS, PHASES, Moment, PartsTimer, StepClock, process_age_s, summarise


class ManualTime:
    """A host clock that moves only when told to."""

    def __init__(self, monkeypatch):
        self.ns = 1_000
        monkeypatch.setattr(clock_module.HostTimer, "stamp", lambda _: self.ns)

    def pass_seconds(self, seconds):
        self.ns += round(seconds * 1e9)


class FakeEvent:
    """Stands for torch.cuda.Event: the device reaches an event one second after the previous one."""

    made = 0
    synchronised = 0
    reached = 0

    def __init__(self, enable_timing):
        assert enable_timing
        FakeEvent.made += 1

    def record(self, stream):
        FakeEvent.reached += 1
        self.at_s = FakeEvent.reached

    def synchronize(self):
        FakeEvent.synchronised += 1

    def elapsed_time(self, later):
        return (later.at_s - self.at_s) * 1e3


@pytest.fixture
def fake_cuda(monkeypatch):
    FakeEvent.made = FakeEvent.synchronised = FakeEvent.reached = 0
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return FakeEvent


def test_step_time_excludes_the_wait_for_data(monkeypatch):
    now = ManualTime(monkeypatch)
    clock = StepClock("cpu")
    clock.begin(7)
    for phase, seconds in (("data", 1.0), ("forward", 2.0), ("backward", 4.0), ("optimizer", 8.0)):
        now.pass_seconds(seconds)
        clock.mark(phase)
    clock.end()
    (record,) = clock.flush()
    assert (record.step, record.data_time_s, record.step_time_s) == (7, 1.0, 14.0)
    assert (record.forward_time_s, record.backward_time_s, record.optimizer_time_s) == (2.0, 4.0, 8.0)


def test_work_after_the_last_mark_belongs_to_the_step(monkeypatch):
    now = ManualTime(monkeypatch)
    clock = StepClock("cpu")
    clock.begin(0)
    now.pass_seconds(1.0)
    clock.mark("optimizer")
    now.pass_seconds(0.5)
    clock.end()
    (record,) = clock.flush()
    assert record.step_time_s == 1.5
    assert record.optimizer_time_s == 1.0


@given(st.lists(st.tuples(st.sampled_from(PHASES), st.integers(0, 10**10)), max_size=30), st.integers(0, 10**9))
def test_phases_of_all_micro_batches_add_up(marks, tail_ns):
    with pytest.MonkeyPatch.context() as monkeypatch:
        now = ManualTime(monkeypatch)
        clock = StepClock("cpu")
        clock.begin(0)
        for phase, ns in marks:
            now.ns += ns
            clock.mark(phase)
        now.ns += tail_ns
        clock.end()
        (record,) = clock.flush()
    for phase in PHASES:
        expected = sum(ns for name, ns in marks if name == phase) / 1e9
        assert getattr(record, f"{phase}_time_s") == pytest.approx(expected, abs=1e-12)
    whole = (sum(ns for _, ns in marks) + tail_ns) / 1e9
    assert record.step_time_s + record.data_time_s == pytest.approx(whole, abs=1e-9)


def test_a_cuda_window_synchronises_once_and_reuses_its_events(fake_cuda):
    clock = StepClock("cuda:0")

    def window(first_step):
        for step in range(first_step, first_step + 5):
            clock.begin(step)
            for phase in ("data", "forward", "backward", "data", "forward", "backward", "optimizer"):
                clock.mark(phase)
            clock.end()

    window(0)
    assert fake_cuda.synchronised == 0
    records = clock.flush()
    assert fake_cuda.synchronised == 1
    made_by_the_first_window = fake_cuda.made
    window(5)
    records += clock.flush()
    assert fake_cuda.made == made_by_the_first_window == 5 * 9
    assert [record.step for record in records] == list(range(10))
    assert {record.data_time_s for record in records} == {2.0}
    assert {record.step_time_s for record in records} == {6.0}


def test_flush_returns_each_finished_step_once_and_leaves_the_open_one():
    clock = StepClock("cpu")
    assert clock.flush() == []
    clock.begin(0)
    clock.end()
    clock.begin(1)
    assert [record.step for record in clock.flush()] == [0]
    clock.end()
    assert [record.step for record in clock.flush()] == [1]


def test_cpu_time_counts_work_and_not_sleep():
    clock = StepClock("cpu")
    clock.begin(0)
    time.sleep(0.2)
    clock.end()
    clock.begin(1)
    spin_until = time.process_time() + 0.05
    while time.process_time() < spin_until:
        pass
    clock.end()
    slept, worked = clock.flush()
    assert slept.step_time_s >= 0.2 > 10 * slept.cpu_time_s
    assert worked.cpu_time_s >= 0.05


def test_a_step_costs_microseconds():
    clock = StepClock("cpu")
    steps = 2_000
    start = time.process_time()
    for step in range(steps):
        clock.begin(step)
        for phase in PHASES:
            clock.mark(phase)
        clock.end()
    assert (time.process_time() - start) / steps < 50e-6


@pytest.mark.parametrize(
    ("calls", "error", "message"),
    [
        (lambda c: c.mark("forward"), RuntimeError, "outside a step"),
        (lambda c: c.end(), RuntimeError, "without begin"),
        (lambda c: (c.begin(1), c.begin(2)), RuntimeError, "step 1 was not ended before step 2"),
        (lambda c: (c.begin(1), c.mark("lunch")), ValueError, "data, forward, backward, optimizer"),
    ],
)
def test_misuse_is_refused(calls, error, message):
    with pytest.raises(error, match=message):
        calls(StepClock("cpu"))


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="'cpu' and 'cuda'"):
        StepClock("abacus:0")


def test_nested_parts_are_exclusive_and_sum_to_the_wall():
    timer = PartsTimer()
    outside = time.perf_counter()
    with timer.part("training"):
        time.sleep(0.03)
        with timer.part("checkpoint"):
            time.sleep(0.05)
        time.sleep(0.02)
    time.sleep(0.01)
    wall = time.perf_counter() - outside
    seconds = timer.seconds()
    assert set(seconds) == set(PARTS)
    assert 0.05 <= seconds["training"] < 0.09
    assert 0.05 <= seconds["checkpoint"] < 0.09
    assert 0.01 <= seconds["other"] < 0.05
    assert sum(seconds.values()) == pytest.approx(wall, abs=5e-3)
    assert timer.wall_s() >= sum(seconds.values())


def test_a_part_that_raises_still_counts():
    timer = PartsTimer()
    with contextlib.suppress(KeyError), timer.part("evaluation"):
        time.sleep(0.01)
        raise KeyError
    assert timer.seconds()["evaluation"] >= 0.01
    before = timer.seconds()["evaluation"]
    time.sleep(0.01)
    assert timer.seconds()["evaluation"] == before


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="load, compile"), PartsTimer().part("lunch"):
        pass


def python(code, repository):
    """A fresh interpreter that finds the package in this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)


def test_parts_since_process_start_match_the_wall_seen_from_outside(repository):
    code = (
        "import time; time.sleep(.3)\n"
        "from tunemap.measure.clock import PartsTimer\n"
        "t = PartsTimer(since_process_start=True)\n"
        "with t.part('training'): time.sleep(.2)\n"
        "print(t.seconds()['load'], t.wall_s())"
    )
    start = time.perf_counter()
    done = python(code, repository)
    outside_s = time.perf_counter() - start
    load_s, wall_s = map(float, done.stdout.split())
    assert load_s >= 0.28
    assert wall_s <= outside_s + 0.02
    assert outside_s - wall_s < 0.5


def test_process_age_grows_with_the_clock():
    before = process_age_s()
    time.sleep(0.05)
    assert process_age_s() - before == pytest.approx(0.05, abs=0.04)


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=50))
def test_summary_agrees_with_the_standard_library(values):
    summary = summarise(values)
    assert summary.n == len(values)
    assert summary.mean == pytest.approx(statistics.fmean(values))
    assert summary.sd == pytest.approx(statistics.stdev(values), abs=1e-9)
    assert summary.cv == pytest.approx(summary.sd / summary.mean)
    assert summary.median == pytest.approx(statistics.median(values))
    assert summary.p95 == pytest.approx(statistics.quantiles(values, n=20, method="inclusive")[-1])


def test_a_single_value_has_no_spread():
    summary = summarise([2.0])
    assert (summary.n, summary.mean, summary.median, summary.p95) == (1, 2.0, 2.0, 2.0)
    assert summary.sd is None
    assert summary.cv is None


def test_an_empty_sample_has_no_summary():
    with pytest.raises(ValueError, match="no step times"):
        summarise([])


def test_importing_the_clock_does_not_import_torch(repository):
    done = python("import sys, tunemap.measure.clock; print('torch' in sys.modules)", repository)
    assert done.stdout.strip() == "False"


def test_a_clock_that_is_set_changes_no_interval_on_one_machine(monkeypatch):
    before, jumped = Moment.now(ago_s=1.0), time.time() + 86_400.0
    monkeypatch.setattr(time, "time", lambda: jumped)
    after = Moment.now()
    assert before.seconds_until(after) == pytest.approx(1.0, abs=0.5)
    assert after.seconds_until(before) == pytest.approx(-1.0, abs=0.5)
    elsewhere = replace(after, boot="another machine")
    assert before.seconds_until(elsewhere) == pytest.approx(86_401.0, abs=0.5)
