"""From the traces of a capture to facts on disk: summary.json, one csv per table (`tunemap.trace.facts`), one step.

The step is timeline.csv (`tunemap.trace.timeline`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tunemap.files import damaged, read_json
from tunemap.trace.command import SUMMARY, read_traces, write_json, write_tables
from tunemap.trace.facts import compute_facts
from tunemap.trace.timeline import step_timeline


def extract(capture: Path, folder: Path) -> None:
    """Write the facts of a capture; of one that failed or was skipped, capture.json with its reason is all there is."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    described = read_json(capture / "capture.json")
    write_json(folder / "capture.json", described)
    if described["outcome"] != "ok":
        print(f"no facts: {described['reason']}", flush=True)
        return
    traces = sorted([*capture.glob("trace.*.json.gz"), *capture.glob("trace.*.sqlite")])
    if not traces:
        raise damaged(capture, f"{capture}: trace.rank0.json.gz and all others are gone")
    trace = read_traces(traces)
    facts = compute_facts(trace)
    write_tables(folder, facts.tables | {"timeline": step_timeline(trace)}, "csv")
    write_json(folder / SUMMARY, facts.summary)
