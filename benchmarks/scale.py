"""What a study of 10,000 runs costs before and after its runs: processor time and peak memory of the real commands.

    python benchmarks/scale.py                     # prints a table for 1, 1,000 and 10,000 runs; minutes
    python benchmarks/scale.py --output benchmarks/results/scale-cpu.json

`tunemap plan --list` and `snakemake --dry-run` plan one experiment with as many points; `make_tables.py` collects
made-up outcomes (tests/unit/report/fake_results.py). Each command is a process of its own, with its children; the
difference to the study of 1 run is what a run adds. benchmarks/report.py does the same for what is made of the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from report import write_study

REPOSITORY = Path(__file__).resolve().parent.parent
SIZES = (1, 1000, 10_000)
SEEDS = 10


def study_of(runs: int) -> dict[str, Any]:
    """A study of so many runs, made of ranks, learning rates and seeds."""
    seeds = min(SEEDS, runs)
    ranks = min(10, runs // seeds)
    rates = runs // seeds // ranks
    return {
        "study": "scale",
        "models": {"tiny": {"source": "tiny"}},
        "datasets": {"arithmetic": {"task": "arithmetic", "source": "made"}},
        "methods": {"lora": {"kind": "lora"}},
        "defaults": {"model": "tiny", "dataset": "arithmetic", "method": "lora", "max_length": 128},
        "hardware": {"device": "cpu"},
        "experiments": [
            {
                "name": "grid",
                "question": "Which rank, which rate?",
                "vary": {
                    "method.rank": [2 + rank for rank in range(ranks)],
                    "learning_rate": [round(1e-4 * (1 + rate), 6) for rate in range(rates)],
                },
                "seeds": list(range(seeds)),
            }
        ],
    }


def cost(command: list[str], *, folder: Path = REPOSITORY, **environment: str) -> dict[str, float]:
    """Seconds of wall and processor, and the peak of memory of the largest process, of a command."""
    code = (
        "import json, resource, subprocess, sys, time; began = time.monotonic(); "
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps([done.returncode, time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss, "
        "done.stderr[-2000:]]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, *command], env=os.environ | environment, cwd=folder, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    exit_code, wall_s, processor_s, peak_kib, said = json.loads(answer.stdout)
    if exit_code != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {exit_code}\n{said}")
    return {"wall_s": wall_s, "processor_s": processor_s, "peak_bytes": peak_kib * 1024}


def measure(runs: int) -> dict[str, Any]:
    """The cost of each command for a study of `runs` runs."""
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study.yaml"
        study.write_text(yaml.safe_dump(study_of(runs)))
        fake = write_study(Path(folder), runs)
        python, bin_folder = sys.executable, Path(sys.executable).parent
        snakemake = [str(bin_folder / "snakemake"), "--snakefile", str(REPOSITORY / "Snakefile"), "--cores", "1"]
        tables = [python, "workflow/scripts/make_tables.py", "--plan", str(fake.plan_path)]
        return {
            "runs": runs,
            "collected_runs": len(fake.plan["runs"]),
            "plan": cost([str(bin_folder / "tunemap"), "plan", "--list", str(study)]),
            "dry_run": cost(
                [*snakemake, "--directory", folder, "--configfile", str(study), "--dry-run", "--quiet"],
                TUNEMAP_PLANNING="off",
            ),
            "collect": cost([*tables, "--results", str(fake.results_dir)]),
        }


def main() -> None:
    """Measure each size and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=list(SIZES), help="sizes of studies")
    parser.add_argument("--output", type=Path, help="also write the results there, with the machine they are from")
    arguments = parser.parse_args()
    began = time.monotonic()
    print(f"{'runs':>6} {'command':>9} {'processor s':>12} {'ms per run':>11} {'peak memory MB':>15}")
    sizes = []
    for runs in arguments.runs:
        sizes.append(found := measure(runs))
        for name in ("plan", "dry_run", "collect"):
            used = found[name]
            per_run_ms = 1000 * used["processor_s"] / (found["collected_runs"] if name == "collect" else runs)
            print(
                f"{runs:6} {name:>9} {used['processor_s']:12.1f} {per_run_ms:11.2f} {used['peak_bytes'] / 1e6:15.0f}",
                flush=True,
            )
    if arguments.output:
        from tunemap.measure.environment import environment

        results = {
            "sizes": sizes,
            "minutes": (time.monotonic() - began) / 60,
            "environment": environment(REPOSITORY).as_dict(),
        }
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
