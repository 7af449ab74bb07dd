"""Planning, tables and page beside what one would do without TuneMap, in processor time, memory and error.

    python benchmarks/alternatives.py                    # prints three tables; minutes for 10,000 runs
    python benchmarks/alternatives.py --runs 100 1000
    python benchmarks/alternatives.py --output benchmarks/results/alternatives-cpu.json

planning  Peaks that others published of one GPU (resources/published), as planned here (`planner.py --published`) and
          as `accelerate estimate-memory` answers for the model, which is asked for no method, batch or length.
tables    Tables of a made-up study (tests/unit/report/fake_results.py), and a script of ten lines of pandas that reads
          the same outcomes into means and deviations: no checksums, no gates, no intervals, no comparisons.
page      `snakemake --report` of the default study beside our page. Needs its results here: make demo.

Tokenisation has benchmarks/tokenisation.py beside `datasets`; facts of profiles have benchmarks/extraction.py beside
nsys-ai and HolisticTraceAnalysis.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import write_study

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED = REPOSITORY / "benchmarks" / "results" / "planner-published.csv"
DEMO = REPOSITORY / "results" / "quickstart"
MIB = 1 << 20


def planning() -> list[dict[str, Any]]:
    """Published peaks of one GPU: planned by us, estimated by accelerate, in MiB and relative errors."""
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from published_memory import published_runs
    from transformers import AutoModel

    from tunemap.models.loading import build_config

    planned = {row["number"]: row for row in csv.DictReader(PUBLISHED.open(newline="", encoding="utf-8"))}
    sizes: dict[str, int] = {}
    found = []
    for one in published_runs():
        row = planned[one.number]
        if row["gpus"] != "1":
            continue
        kind = str(one.model["model_type"])
        if kind not in sizes:
            with init_empty_weights():
                sizes[kind] = calculate_maximum_sizes(AutoModel.from_config(build_config(one.model, Path(kind))))[0]
        dtype = "float32" if one.precision == "fp32" else "bfloat16"
        estimated = max(estimate_training_usage(sizes[kind], dtype).values()) / MIB
        published = float(row["published_mib"])
        found.append(
            {"number": one.number, "method": row["method"], "published_mib": published}
            | {"planned_mib": float(row["planned_mib"]), "planned_error": float(row["error"])}
            | {"accelerate_mib": round(estimated, 1), "accelerate_error": round(estimated / published - 1, 4)}
        )
    return found


def collect_with_pandas(results: Path) -> None:
    """What a script beside a sweep does: outcomes and accuracies into one table, means and deviations by method."""
    import pandas as pd

    outcomes = pd.json_normalize([json.loads(path.read_text()) for path in results.glob("runs/*/outcome.json")])
    answers = pd.json_normalize(
        [json.loads(path.read_text()) for path in results.glob("evaluations/*/evaluation.json")]
    )
    runs = outcomes.merge(answers, on="run", how="left", suffixes=("", "_evaluation"))
    runs.to_csv(results / "pandas.csv", index=False)
    values = [name for name in runs.columns if name.startswith("measurements.")]
    numbers = runs[values].apply(pd.to_numeric, errors="coerce").assign(accuracy=runs["accuracy"])
    by_method = numbers.groupby([runs["spec.method_name"], runs["spec.method.rank"]], dropna=False)
    by_method.agg(["mean", "std", "count"]).to_csv(results / "pandas_by_method.csv")


def tables_of(runs: int, how: str) -> dict[str, float]:
    """Processor seconds and peak memory of the tables of a made-up study, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        fake = write_study(Path(folder), runs)
        count = len(fake.plan["runs"])
        start = time.process_time()
        if how == "tunemap":
            from tunemap.collect import write_tables

            write_tables(fake.plan_path, fake.results_dir)
        else:
            collect_with_pandas(fake.results_dir)
        seconds = time.process_time() - start
    # not ru_maxrss: a child inherits that of the process that started it
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    return {"runs": count, "cpu_s": seconds, "peak_bytes": peak}


def tables(sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Both ways at each size, each in a process of its own, its imports included."""
    for runs in sizes:
        ours, pandas = (_in_process("--tables-of", str(runs), how) for how in ("tunemap", "pandas"))
        yield {
            "runs": ours["runs"],
            **{f"{name}_{key}": one[key] for name, one in (("tunemap", ours), ("pandas", pandas)) for key in PARTS},
        }


PARTS = ("cpu_s", "peak_bytes")


def pages() -> list[dict[str, Any]]:
    """Our page of the default study and Snakemake's report of it: processor seconds with all children, and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        plan = DEMO / "plan.json"
        ours, theirs = Path(folder) / "report.html", Path(folder) / "report.zip"
        script = ["workflow/scripts/make_report.py", "--plan", str(plan), "--results", str(DEMO), "--logs", "logs"]
        commands = {
            "tunemap": (ours, [sys.executable, *script, "--output", str(ours)]),
            "snakemake --report": (theirs, ["snakemake", "--report", str(theirs)]),
        }
        found = []
        for name, (file, command) in commands.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            found.append({"page": name, "cpu_s": seconds, "bytes": file.stat().st_size})
        return found


def _in_process(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000, 10_000], help="sizes of studies for tables")
    parser.add_argument("--output", type=Path, help="json file to keep the results in")
    parser.add_argument("--tables-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tables_of:
        print(json.dumps(tables_of(int(arguments.tables_of[0]), arguments.tables_of[1])))
        return
    found: dict[str, Any] = {"planning": planning(), "tables": [], "pages": []}
    for name in ("planned", "accelerate"):
        errors = [abs(row[f"{name}_error"]) for row in found["planning"]]
        print(f"{len(errors)} published peaks, {name}: median error {statistics.median(errors):.1%}, {max(errors):.1%}")
    for row in tables(arguments.runs):
        found["tables"].append(row)
        told = "; ".join(
            f"{name} {row[f'{name}_cpu_s']:.1f} s, {row[f'{name}_peak_bytes'] / 1e6:.0f} MB"
            for name in ("tunemap", "pandas")
        )
        print(f"tables of {row['runs']:.0f} runs: {told}", flush=True)
    if (DEMO / "report.html").exists():
        found["pages"] = pages()
        for row in found["pages"]:
            print(f"page of the default study, {row['page']}: {row['cpu_s']:.1f} s, {row['bytes'] / 1e6:.2f} MB")
    else:
        print(f"no {DEMO / 'report.html'}: make demo, to compare the page")
    if arguments.output:
        from tunemap.measure.environment import environment

        kept = found | {"environment": environment(REPOSITORY).as_dict()}
        arguments.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
