"""Which devices a run gets: those that are free, those that it was given, or a clear refusal."""

import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest

from tunemap.training import devices
from tunemap.training.devices import device_kind, lease_devices
from tunemap.training.failure import UnsupportedRunError


@pytest.fixture
def workstation(monkeypatch, tmp_path):
    """A machine that shows four GPUs and has its leases in a folder of the test."""
    monkeypatch.setattr(devices, "visible_gpu_count", lambda: 4)
    monkeypatch.setattr(devices, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "tunemap-device-leases"


def visible(held):
    return held.environment["CUDA_VISIBLE_DEVICES"]


def test_runs_at_the_same_time_get_different_devices(workstation):
    with lease_devices("auto", 2) as first, lease_devices("cuda", 1) as second, lease_devices("cuda", 1) as third:
        assert [visible(held) for held in (first, second, third)] == ["0,1", "2", "3"]
        assert first.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    with lease_devices("cuda", 4) as again:
        assert visible(again) == "0,1,2,3"


def test_run_waits_for_a_device_that_another_one_holds(workstation):
    order = []

    def wait():
        with lease_devices("cuda", 3) as held:
            order.append(visible(held))

    with lease_devices("cuda", 2):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.1)
        assert order == []
        with lease_devices("cuda", 2) as small:  # while it waits it holds nothing
            order.append(visible(small))
    waiting.join(10)
    assert order == ["2,3", "0,1,2"]


def test_lease_ends_with_the_process_that_held_it(workstation):
    with lease_devices("cuda", 1):
        pass
    program = (
        "import fcntl, sys, time; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", program, str(workstation / "gpu0.lock")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with lease_devices("cuda", 1) as held:
            assert visible(held) == "1"
        holder.kill()
    with lease_devices("cuda", 1) as held:
        assert visible(held) == "0"


def test_lock_files_serve_every_user(workstation):
    with lease_devices("cuda", 1):
        assert workstation.stat().st_mode & 0o777 == 0o777
    (workstation / "gpu0.lock").chmod(0o444)  # as another user sees it
    with lease_devices("cuda", 1) as held:
        assert visible(held) == "0"


def test_devices_that_were_given_are_leased_among_those_who_have_them(workstation, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7,GPU-8a")
    with lease_devices("cuda", 2) as first, lease_devices("cuda", 1) as second:
        assert [visible(held) for held in (first, second)] == ["5,7", "GPU-8a"]
        assert "CUDA_DEVICE_ORDER" not in first.environment
        late = threading.Thread(target=lambda: lease_devices("cuda", 3).__enter__())
        late.start()
        late.join(0.1)
        assert late.is_alive()
    late.join(10)
    assert not late.is_alive()
    assert capsys.readouterr().out == "waiting for 3 of 3 GPUs: other runs hold 3\n"


def test_a_device_is_one_whatever_it_is_called(workstation, monkeypatch):
    monkeypatch.setattr(devices, "nvml", lambda: nullcontext("driver"))
    monkeypatch.setattr(devices, "visible_gpu_count", lambda: 2)
    monkeypatch.setattr(devices, "visible_handles", lambda driver: ["GPU-a", "GPU-b"])
    monkeypatch.setattr(devices, "ask", lambda driver, question, handle: handle)
    with lease_devices("cuda", 1) as by_index:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")  # as another process may call the same two
        with lease_devices("cuda", 1) as by_name:
            assert (visible(by_index), visible(by_name)) == ("0", "5")
            assert sorted(path.name for path in workstation.iterdir()) == ["GPU-a.lock", "GPU-b.lock"]


@pytest.mark.parametrize(("given", "shown"), [(None, 4), ("0,1", 2)])
def test_more_devices_than_there_are_is_refused(workstation, monkeypatch, given, shown):
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    with pytest.raises(UnsupportedRunError, match=f"asks for 8 GPUs, {shown} are visible on this machine"):
        lease_devices("cuda", 8).__enter__()


def test_machine_without_a_gpu_trains_on_its_cpu_or_says_why_not(monkeypatch):
    monkeypatch.setattr(devices, "visible_gpu_count", lambda: 0)
    assert device_kind("auto") == "cpu"
    with lease_devices("auto", 64) as held:  # processes, of which a CPU takes any number
        assert (held.kind, visible(held)) == ("cpu", "")
    with pytest.raises(UnsupportedRunError, match=r"hardware.device is cuda, and this machine shows no GPU"):
        device_kind("cuda")
