"""Kills for want of memory, as both versions of control groups count them."""

import pytest

from tunemap.training.hostmemory import oom_kills


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/slurm/job_7/task_0\n", "slurm/job_7/task_0/memory.events"),
        ("5:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n", "memory/slurm/job_7/memory.oom_control"),
    ],
)
def test_kills_are_read_from_the_own_group(tmp_path, membership, file):
    (tmp_path / "cgroup").write_text(membership)
    counts = tmp_path / "root" / file
    counts.parent.mkdir(parents=True)
    counts.write_text("low 0\nmax 5\noom 3\noom_kill 2\n")
    assert oom_kills(tmp_path / "cgroup", tmp_path / "root") == 2


def test_without_control_groups_there_are_none_to_see(tmp_path):
    assert oom_kills(tmp_path / "missing", tmp_path) == 0
    (tmp_path / "cgroup").write_text("0::/gone\n")
    assert oom_kills(tmp_path / "cgroup", tmp_path) == 0
