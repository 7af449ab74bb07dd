"""What Snakemake and TuneMap cost per run when a study of thousands of runs is really executed.

    python benchmarks/executed.py --runs 100 1000         # minutes
    python benchmarks/executed.py --runs 10000 --output benchmarks/results/executed-cpu.json

In a copy of the checkout, the programs that train and evaluate are replaced by a stub that writes a made-up outcome
(tests/unit/report/fake_results.py) and ends; all else is the product: study file, plan, Snakemake with
`--profile profiles/local`, one job for each training and each evaluation, tables, figures, database and report. Then
a dry run of the same command, which must find nothing to do.
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

from scale import REPOSITORY, cost, study_of

sys.path.insert(0, str(REPOSITORY))
from tests.small_study import STUDY
from tests.workflow.conftest import make_checkout
from tunemap.files import write_json
from tunemap.study_file import load_plan

CAPTURED: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
STUB = '''"""Stands in for training and evaluation: writes made-up results of the run that it is told."""
import json, sys
from pathlib import Path

sys.path.insert(0, {fake_results!r})
import fake_results

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = json.loads(given["--spec"])
run |= json.loads(Path("digests", run["id"]).read_text())
fake = fake_results.Fake(Path("none"), Path("results/scale"))
if "--weights" in given and "--steps" in given:
    Path(given["--weights"]).mkdir(parents=True)
    Path(given["--steps"]).touch()
    fake_results._write_run(fake, run, "ok", None)
else:
    fake_results._write_evaluation(fake, run, "ok", [0.1 * example for example in range(50)])
    Path(given["--predictions"]).touch()
'''


def execute(runs: int) -> dict[str, Any]:
    """Run a study of `runs` runs to its report, then ask again."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "checkout"
        study = study_of(runs) | {key: STUDY[key] for key in ("models", "datasets")}
        study |= {"data_root": str(root / "data")}
        study["defaults"] |= {"model": "small"}
        make_checkout(REPOSITORY, root, study)
        stub = STUB.format(fake_results=str(REPOSITORY / "tests" / "unit" / "report"))
        for script in ("train_run.py", "evaluate_run.py"):
            (root / "workflow" / "scripts" / script).write_text(stub)
        (root / "digests").mkdir()
        for run in load_plan(root / "study.yaml").runs.values():
            digests = {"digest": run.training_digest, "evaluation_digest": run.evaluation_digest}
            (root / "digests" / run.id).write_text(json.dumps(digests))
        snakemake = [str(Path(sys.executable).parent / "snakemake"), "--profile", "profiles/local", "--quiet", "rules"]
        snakemake += ["--configfile", "study.yaml"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        first = cost(snakemake, folder=root, PATH=path)
        began = time.monotonic()
        again = subprocess.run([*snakemake, "--dry-run"], cwd=root, env=os.environ | {"PATH": path}, **CAPTURED)
        again_s = time.monotonic() - began
        if "Nothing to be done" not in again.stdout:
            raise SystemExit(f"a dry run of the same command does not find everything done:\n{again.stdout[-2000:]}")
        done = root / "results" / "scale"
        return {
            "runs": runs,
            "outcomes": len(list(done.glob("runs/*/outcome.json"))),
            "evaluations": len(list(done.glob("evaluations/*/evaluation.json"))),
            "report_bytes": (done / "report.html").stat().st_size,
            "execute": first,
            "nothing_to_do_s": again_s,
        }


def main() -> None:
    """Measure each size and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000], help="sizes of studies")
    parser.add_argument("--output", type=Path, help="also write the results there, with the machine they are from")
    arguments = parser.parse_args()
    began, sizes = time.monotonic(), []
    print(f"{'runs':>6} {'outcomes':>9} {'wall s':>8} {'ms per run':>11} {'largest process MB':>19} {'again s':>8}")
    for runs in arguments.runs:
        sizes.append(found := execute(runs))
        used = found["execute"]
        print(
            f"{runs:6} {found['outcomes']:9} {used['wall_s']:8.1f} {1000 * used['wall_s'] / runs:11.1f}"
            f" {used['peak_bytes'] / 1e6:19.0f} {found['nothing_to_do_s']:8.1f}",
            flush=True,
        )
    if arguments.output:
        from tunemap.measure.environment import environment

        described = environment(REPOSITORY).as_dict()
        minutes = (time.monotonic() - began) / 60
        write_json(arguments.output, {"sizes": sizes, "minutes": minutes, "environment": described})


if __name__ == "__main__":
    main()
