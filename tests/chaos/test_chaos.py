"""A short campaign of faults against every stage; it has a process of its own, for what it patches stays patched."""

import csv
import subprocess
import sys


def test_every_fault_is_survived_and_nothing_is_lost(repository, tmp_path):
    output = tmp_path / "chaos.csv"
    command = [sys.executable, "-m", "tests.chaos.campaign", "--seed", "3", "--faults", "20"]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=repository, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["survived"] for row in rows} == {"True"}
    assert {row["lost"] for row in rows} == {"0"}
