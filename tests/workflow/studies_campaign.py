"""Every study file of config/studies from the command to its report: `make studies`, an hour on two cores.

    python -m tests.workflow.studies_campaign                               # all, each at its smallest scale
    python -m tests.workflow.studies_campaign --studies qwen_gsm8k_peft --scale real_data

Each is run by real Snakemake in one copy of the checkout, so that studies share prepared models and data as they do for
a user. A line tells what became of the runs; the exit code is 1 if one has no outcome, or ended as `error`, `oom` or
`timeout`, or if a study has no report. Runs that a gate refuses are counted and named, not forbidden: refusing is what
the replications are there to show.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tests.chaos.record import record
from tests.workflow.conftest import make_checkout
from tunemap.study_file import load_plan

REPOSITORY = Path(__file__).resolve().parents[2]
STUDIES = REPOSITORY / "config" / "studies"
OUTCOMES = ("ok", "invalid", "error", "oom", "timeout", "missing")


def scale_of(study: Path, wanted: str) -> str | None:
    """The scale `wanted` if the study has it; None is the study as it stands."""
    return wanted if wanted in (yaml.safe_load(study.read_text()).get("scales") or {}) else None


def run_study(checkout: Path, name: str, scale: str | None, data_root: Path, log: Path) -> dict[str, Any]:
    """Run one study to its report and count what it left."""
    study = Path("config") / "studies" / f"{name}.yaml"
    plan = load_plan(checkout / study, scale=scale, data_root=str(data_root))
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--configfile", str(study)]
    command += ["--config", f"data_root={data_root}", *([f"scale={scale}"] if scale else [])]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    began = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(command, cwd=checkout, env=os.environ | {"PATH": path}, stdout=file, stderr=file)
    results = checkout / "results" / plan.study.study
    outcomes = Counter(_outcome(results / "runs" / run / "outcome.json") for run in plan.runs)
    report = results / "report.html"
    return {
        "study": name,
        "scale": scale or "as it stands",
        "exit_code": done.returncode,
        "runs": len(plan.runs),
        **{outcome: outcomes[outcome] for outcome in OUTCOMES},
        "evaluations_ok": sum(_outcome(path) == "ok" for path in results.glob("evaluations/*/evaluation.json")),
        "captures": len(list(results.glob("facts/*/summary.json"))),
        "figures": len(list(results.glob("figures/*.svg"))),
        "gates": " ".join(sorted(_tripped(results / "tables" / "gates.csv"))),
        "report_bytes": report.stat().st_size if report.exists() else 0,
        "seconds": round(time.monotonic() - began),
    }


def _outcome(path: Path) -> str:
    return str(json.loads(path.read_text())["outcome"]) if path.exists() else "missing"


def _tripped(table: Path) -> set[str]:
    if not table.exists():
        return set()
    with table.open() as file:
        return {row["gate"] for row in csv.DictReader(file) if row["passed"].lower() in {"false", "0"}}


def failed(row: dict[str, Any]) -> bool:
    """Whether something was lost or broke."""
    return bool(row["error"] + row["oom"] + row["timeout"] + row["missing"] or not row["report_bytes"])


def main() -> int:
    """Run the studies of the command line, print and keep the table."""
    known = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", choices=known, default=known)
    parser.add_argument("--scale", default="cpu", help="of the studies that have it; the others run as they stand")
    parser.add_argument("--data-root", type=Path, default=REPOSITORY.parent / "shared" / "data", help="of real data")
    parser.add_argument("--checkout", type=Path, help="where to run, kept afterwards; made if it is not there")
    parser.add_argument("--output", type=Path, help="csv file for the rows; sums and machine go beside it as json")
    arguments = parser.parse_args()
    began, kept = time.monotonic(), read_rows(arguments.output)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkout = arguments.checkout or Path(folder) / "checkout"
        if not checkout.exists():
            make_checkout(REPOSITORY, checkout)
        for name in arguments.studies:
            log = checkout / f"{name}.log"
            scale = scale_of(STUDIES / f"{name}.yaml", arguments.scale)
            rows.append(row := run_study(checkout, name, scale, arguments.data_root.resolve(), log))
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if failed(row):
                print("".join(log.read_text().splitlines(keepends=True)[-40:]), flush=True)
            if arguments.output:
                keep_rows(arguments.output, kept, rows, time.monotonic() - began)
    return 1 if any(map(failed, rows)) else 0


def read_rows(table: Path | None) -> list[dict[str, Any]]:
    """Rows of an earlier campaign, whose studies this one may not repeat."""
    if table is None or not table.exists():
        return []
    with table.open() as file:
        return list(csv.DictReader(file))


def keep_rows(table: Path, kept: list[dict[str, Any]], rows: list[dict[str, Any]], seconds: float) -> None:
    """Write the table after each study: a campaign of an hour may be stopped."""
    new = {(row["study"], row["scale"]) for row in rows}
    together = [row for row in kept if (row["study"], row["scale"]) not in new] + rows
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(together)
    sums = {"studies": len(together), "failed_in_this_campaign": sum(map(failed, rows))}
    record(table, seed=0, seconds=seconds, sums=sums)


if __name__ == "__main__":
    sys.exit(main())
