"""The fingerprint: complete, JSON-able, and free of anything private."""

import getpass
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tunemap.measure.environment import (
    ENVIRONMENT_VARIABLES,
    device_fingerprint,
    device_state,
    digest_sources,
    environment,
    git_state,
    package_digest,
    package_versions,
    usable_cores,
)


def git(root, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "a.txt").write_text("one")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_the_fingerprint_is_json_and_says_what_ran(checkout, no_driver):
    fingerprint = environment(checkout).as_dict()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["python"] == platform.python_version()
    assert fingerprint["packages"]["torch"] == importlib.metadata.version("torch")
    assert fingerprint["git"]["dirty"] is False
    assert fingerprint["cpu"]["memory_bytes"] > 2**28
    assert fingerprint["threads"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert fingerprint["gpus"] == []
    assert fingerprint["cuda"]["driver"] is None


def test_no_user_host_or_unlisted_variable_appears(checkout, monkeypatch, no_driver):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("SLURM_JOB_USER", "somebody-secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(getpass, "getuser", lambda: "somebody-secret")
    fingerprint = environment(checkout).as_dict()
    written = json.dumps(fingerprint)
    assert "secret" not in written
    assert socket.gethostname() not in written
    assert str(checkout) not in written
    assert fingerprint["variables"]["OMP_NUM_THREADS"] == "3"
    assert set(fingerprint["variables"]) <= set(ENVIRONMENT_VARIABLES)


def test_listed_variables_hold_no_names_or_secrets():
    for word in ("TOKEN", "KEY", "SECRET", "PASSWORD", "USER", "HOST", "HOME", "PATH", "ADDR"):
        assert not [name for name in ENVIRONMENT_VARIABLES if word in name.split("_")]


def test_git_state_sees_edits_and_new_files(checkout):
    clean = git_state(checkout)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (checkout / "new.txt").write_text("x")
    assert git_state(checkout) == {**clean, "dirty": True}


def test_git_state_is_none_outside_a_checkout(checkout, tmp_path_factory):
    inside = checkout / "installed"
    inside.mkdir()
    assert git_state(inside) is None
    assert git_state(tmp_path_factory.mktemp("plain")) is None
    assert git_state(checkout / "absent") is None


def test_git_state_is_none_before_the_first_commit(tmp_path):
    git(tmp_path, "init")
    assert git_state(tmp_path) is None


def test_git_state_is_none_without_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state(checkout) is None


def test_absent_packages_are_left_out():
    assert package_versions(["no-such-package-here", "numpy"]) == {"numpy": importlib.metadata.version("numpy")}


def test_versions_are_read_without_importing(repository):
    code = (
        "import sys; from tunemap.measure.environment import environment; from pathlib import Path;"
        "e = environment(); print(e.packages.get('torch'), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    path = {**os.environ, "PYTHONPATH": str(repository / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout.split() == [importlib.metadata.version("torch"), "False", "False"]


def test_source_digest_follows_content_and_names_but_not_order_or_place(tmp_path):
    def tree(name, files):
        for path, content in files:
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(content)
        return digest_sources(tmp_path / name)

    first = tree("first", [("a.py", "1"), ("b/c.py", "2"), ("notes.txt", "n")])
    assert tree("second", [("b/c.py", "2"), ("a.py", "1")]) == first
    assert tree("content", [("a.py", "1"), ("b/c.py", "3")]) != first
    assert tree("name", [("a.py", "1"), ("b/d.py", "2")]) != first
    assert tree("border", [("a.py", "12"), ("b/c.py", "")]) != first


def test_package_digest_is_that_of_the_source_folder(repository):
    assert package_digest() == digest_sources(repository / "src" / "tunemap")


@pytest.fixture
def two_gpus(driver):
    driver.answers.update(
        nvmlDeviceGetName=lambda handle: b"NVIDIA A100-SXM4-80GB",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 * 2**30),
        nvmlDeviceGetCudaComputeCapability=lambda handle: (8, 0),
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 400_000,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1000 + handle,
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1410 if kind == 1 else 1593,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 4,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=9, usedGpuMemory=1)],
        nvmlDeviceGetTopologyCommonAncestor=lambda first, second: 50,
        nvmlSystemGetDriverVersion=lambda: "580.10",
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13010,
    )
    return driver


def test_gpus_are_described_by_the_driver(two_gpus):
    fingerprint = environment().as_dict()
    first, second = fingerprint["gpus"]
    assert first["name"] == "NVIDIA A100-SXM4-80GB"
    assert first["compute_capability"] == "8.0"
    assert first["power_limit_w"] == 400.0
    assert (first["sm_clock_mhz"], second["sm_clock_mhz"]) == (1000, 1001)
    assert first["throttle_reasons"] == 4
    assert first["process_ids"] == [9]
    assert first["mig"] is None
    assert fingerprint["gpu_links"] == {"0-1": "SYS"}
    assert fingerprint["cuda"]["driver"] == "580.10"
    assert fingerprint["cuda"]["driver_supports"] == "13.1"
    json.dumps(fingerprint)


def test_nvlinks_are_counted(two_gpus):
    two_gpus.answers["nvmlDeviceGetP2PStatus"] = lambda first, second, kind: 0
    two_gpus.answers["nvmlDeviceGetNvLinkState"] = lambda handle, link: 1 if link < 12 else 0
    assert environment().gpu_links == {"0-1": "NV12"}


def test_the_state_of_one_device(two_gpus):
    assert device_state("cuda:1")["sm_clock_mhz"] == 1001
    assert device_state("cpu") is None


def test_device_fingerprint_ignores_the_moment_and_sees_the_power_limit(two_gpus):
    before = device_fingerprint("cuda:0")
    two_gpus.answers["nvmlDeviceGetClockInfo"] = lambda handle, kind: 345
    two_gpus.answers["nvmlDeviceGetComputeRunningProcesses"] = lambda handle: []
    assert device_fingerprint("cuda:0") == before
    two_gpus.answers["nvmlDeviceGetEnforcedPowerLimit"] = lambda handle: 300_000
    assert device_fingerprint("cuda:0") != before
    assert device_fingerprint("cpu") != before


def test_a_cpus_fingerprint_sees_its_threads(no_driver):
    import torch

    before, threads = device_fingerprint("cpu"), torch.get_num_threads()
    assert device_fingerprint("cpu") == before
    torch.set_num_threads(threads + 1)
    try:
        assert device_fingerprint("cpu") != before
    finally:
        torch.set_num_threads(threads)


def test_usable_cores_follow_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7})
    assert usable_cores() == 3
