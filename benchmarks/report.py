"""What a report costs: size, processor time and memory of tables, page and database for 100, 1,000 and 10,000 runs.

    python benchmarks/report.py                    # prints a table; minutes for 10,000 runs
    python benchmarks/report.py --runs 100 1000
    python benchmarks/report.py --output benchmarks/results/report-cpu.json

The studies are made up (tests/unit/report/fake_results.py): real file formats, invented numbers, experiments of 100
runs each. Every size is measured in a process of its own, for its peak of memory. Figures belong to experiments and
not to runs: the time of one experiment's figures is printed apart, and the page is measured without them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
SEEDS, RANKS = 10, (2, 4, 8, 16, 32)
EXAMPLES = 50
PAGE_LIMIT_BYTES = 5_000_000  # of a study of 100 runs, with its figures


def _fake_results() -> Any:
    spec = importlib.util.spec_from_file_location("fake_results", REPOSITORY / "tests/unit/report/fake_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_results"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_study(root: Path, runs: int) -> Any:
    """A study of about `runs` runs: as many copies of one pair of experiments, under names of their own."""
    fake_results = _fake_results()
    fake = fake_results.Fake(root / "plan.json", root / "results" / "fake")
    whole: dict[str, Any] = fake_results.plan(SEEDS, RANKS)
    pair = whole["experiments"]
    originals = list(whole["runs"].values())
    whole |= {"experiments": [], "runs": {}}
    for copy in range(max(1, round(runs / len(originals)))):
        names = {run["id"]: f"{run['id']}.copy-{copy}" for run in originals}
        for experiment in pair:
            renamed = {key: [names[run] for run in experiment[key]] for key in ("runs", "base_runs")}
            whole["experiments"].append(experiment | renamed | {"name": f"{experiment['name']}-{copy}"})
        for run in originals:
            made = run | {"id": names[run["id"]]}
            whole["runs"][made["id"]] = made
            fake_results._write_run(fake, made, "ok", None)
            fake_results._write_evaluation(fake, made, "ok", [0.1 * example for example in range(EXAMPLES)])
    fake.plan_path.write_text(json.dumps(whole))
    return fake


def measure(runs: int, *, with_figures: bool) -> dict[str, float]:
    """Seconds of processor time and bytes of each part, in this process."""
    from tunemap.collect import write_tables
    from tunemap.report.database import write_database
    from tunemap.report.figures import write_figures
    from tunemap.report.page import write_report

    with tempfile.TemporaryDirectory() as folder:
        fake = write_study(Path(folder), runs)
        results, found = fake.results_dir, {"runs": float(len(fake.plan["runs"]))}
        (results / "figures").mkdir()
        (results / "figures" / "figures.json").write_text("[]")
        parts = {
            "tables": lambda: write_tables(fake.plan_path, results),
            "figures": lambda: write_figures(results / "tables", results / "figures", fake.plan_path),
            "page": lambda: write_report(fake.plan_path, results, results / "report.html"),
            "database": lambda: write_database(fake.plan_path, results, results / "study.sqlite"),
        }
        for name, work in parts.items():
            if name != "figures" or with_figures:
                start = time.process_time()
                work()
                found[f"{name}_s"] = time.process_time() - start
        found["page_bytes"] = (results / "report.html").stat().st_size
        found["database_bytes"] = (results / "study.sqlite").stat().st_size
        found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return found


def main() -> None:
    """Measure each size in a process of its own and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000, 10000], help="sizes of studies")
    parser.add_argument("--output", type=Path, help="also write the results there, with the machine they are from")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--figures", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, with_figures=arguments.figures)))
        return
    print(
        f"{'runs':>6} {'tables s':>9} {'page s':>7} {'page MB':>8} {'database s':>11} {'MB':>6} {'peak memory MB':>15}"
    )
    sizes = []
    for runs in arguments.runs:
        sizes.append(found := _in_process(runs))
        print(
            f"{found['runs']:6.0f} {found['tables_s']:9.1f} {found['page_s']:7.1f} {found['page_bytes'] / 1e6:8.2f}"
            f" {found['database_s']:11.1f} {found['database_bytes'] / 1e6:6.1f} {found['peak_bytes'] / 1e6:15.0f}",
            flush=True,
        )
    found = _in_process(100, "--figures")
    verdict = "under" if found["page_bytes"] < PAGE_LIMIT_BYTES else "OVER"
    print(
        f"with figures, {found['runs']:.0f} runs: drawing {found['figures_s']:.1f} s, page"
        f" {found['page_bytes'] / 1e6:.2f} MB ({verdict} {PAGE_LIMIT_BYTES / 1e6:.0f} MB)"
    )
    if arguments.output:
        from tunemap.measure.environment import environment  # torch, which making reports does without

        results = {"sizes": sizes, "with_figures": found, "environment": environment(REPOSITORY).as_dict()}
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def _in_process(runs: int, *more: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(runs), *more]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    values: dict[str, float] = json.loads(answer)
    return values


if __name__ == "__main__":
    main()
