"""The literal `snakemake --profile slurm` on a real one-host Slurm with fake GPUs."""

import json
import os
import shutil
import subprocess
import tempfile

import pytest

from tests.workflow.conftest import FULL, STUDY, make_checkout

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def slurm(shared_data):
    """Environment variables of a running Slurm without accounting; skips where none can be started."""
    scripts = shared_data.parent / "slurm"
    if not scripts.is_dir():
        pytest.skip(f"no {scripts}: the scripts that start Slurm are missing")
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None and os.geteuid() != 0:
        pytest.skip("Slurm is not installed, and installing it needs root")
    if shutil.which("apt-get") is None:
        pytest.skip("Slurm is started from Debian's packages, and this is no Debian")
    folder = tempfile.mkdtemp(prefix="slurm-")  # munge wants folders that all may enter, which pytest's are not
    os.chmod(folder, 0o755)
    settings = {"SLURM_TEST_DIR": str(folder), "SLURM_TEST_ACCOUNTING": "none"}
    environment = os.environ | settings
    started = subprocess.run([scripts / "start-slurm.sh"], env=environment, capture_output=True, text=True)
    assert started.returncode == 0, started.stdout + started.stderr
    yield {"SLURM_CONF": f"{folder}/etc/slurm.conf", "PATH": f"{folder}/bin"}
    subprocess.run([scripts / "stop-slurm.sh"], env=environment, capture_output=True, check=True)
    shutil.rmtree(folder)


def test_a_study_runs_through_slurm(repository, slurm, tmp_path):
    study = STUDY | {"experiments": [{"name": "one", "question": "Does it run?", "fixed": {"method": "full"}}]}
    checkout = make_checkout(repository, tmp_path / "checkout", study)
    profile = checkout.root / "profiles" / "slurm" / "config.yaml"
    text = profile.read_text()
    for before, after in {  # what profiles/slurm asks its users to edit, for a cluster without accounting
        "slurm_partition: main": "slurm_partition: gpu",
        "# slurm-status-command: squeue": "slurm-status-command: squeue",
        "slurm-init-seconds-before-status-checks: 15": "slurm-init-seconds-before-status-checks: 4",
    }.items():
        assert before in text
        text = text.replace(before, after)
    profile.write_text(text)
    environment = checkout.environment()
    environment |= slurm | {"PATH": f"{slurm['PATH']}:{environment['PATH']}:/usr/sbin"}
    command = ["snakemake", "--profile", "slurm", "--configfile", "study.yaml"]
    done = subprocess.run(command, cwd=checkout.root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads((checkout.results / "runs" / FULL / "outcome.json").read_text())
    assert outcome["outcome"] == "ok"
    assert (checkout.results / "report.html").exists()
    assert "submitted with SLURM jobid" in done.stdout + done.stderr
