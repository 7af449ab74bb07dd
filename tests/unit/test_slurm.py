"""What is asked of Slurm, with stand-ins for its programs."""

import os
import subprocess

from tunemap.slurm import QueuedJob, jobs_of_workflow, keep_configuration, queue


def _program(folder, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_the_queue_is_read_by_one_call(tmp_path, monkeypatch):
    line = "7|PENDING|(Resources)|rule_train_wildcards_s_r|/a folder|with a bar"
    _program(tmp_path / "bin", "squeue", f"echo call >>{tmp_path}/calls; echo '{line}'; echo '8|RUNNING|n1|(null)|/b'")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    first, second = queue()
    assert first == QueuedJob("7", "PENDING", "(Resources)", "rule_train_wildcards_s_r", "/a folder|with a bar")
    assert first.is_waiting
    assert not second.is_waiting
    assert (tmp_path / "calls").read_text() == "call\n"


def test_without_slurm_nobody_knows(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue() is None
    _program(tmp_path / "bin", "squeue", "echo 'slurm_load_jobs error' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert queue() is None


def test_jobs_of_other_folders_and_other_programs_are_left_out(tmp_path):
    mine = QueuedJob("1", "RUNNING", "n1", "rule_train_wildcards_s_r", str(tmp_path))
    jobs = [mine, QueuedJob("2", "RUNNING", "n1", "rule_x", "/"), QueuedJob("3", "RUNNING", "n1", "", str(tmp_path))]
    assert jobs_of_workflow(jobs, tmp_path) == [mine]


def test_srun_in_a_job_knows_the_configuration_again(tmp_path):
    _program(tmp_path / "real", "srun", 'echo "$SLURM_CONF $1"')
    environment = {"SLURM_CONF": "/etc/some slurm.conf", "PATH": f"{tmp_path}/real{os.pathsep}/usr/bin{os.pathsep}/bin"}
    for _ in range(2):
        keep_configuration(environment, tmp_path / "wrapper")
    assert environment["PATH"].count("wrapper") == 1
    del environment["SLURM_CONF"]  # as the plugin does
    said = subprocess.run(["srun", "x"], env=environment, capture_output=True, text=True, check=True).stdout
    assert said == "/etc/some slurm.conf x\n"


def test_sites_that_do_not_name_a_configuration_keep_their_path(tmp_path):
    environment = {"PATH": "/usr/bin"}
    keep_configuration(environment, tmp_path / "wrapper")
    assert environment == {"PATH": "/usr/bin"}
    assert not (tmp_path / "wrapper").exists()
