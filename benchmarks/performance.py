"""Writes docs/performance.md from the results of the benchmarks, so that its numbers are those that were measured.

python benchmarks/performance.py             # writes it
python benchmarks/performance.py --check     # fails if it is not what the results say
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEVICES = ("cpu", "cuda")
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "performance.md"
INTRODUCTION = """# Performance

What TuneMap costs, and what its settings bring. Every table is written by `python benchmarks/performance.py` from a
file in `benchmarks/results`, which holds the machine with its versions; a table that is missing here has not been
measured. Ratios and processor time travel between machines, seconds do not. Brackets hold 95 % intervals: of the
instruments, of what the step leaves out and of GoRA a bootstrap interval of the median ratio over blocks or rounds, of
all other ratios a t interval of their geometric mean over the rounds. One round has none.
The command below a table measures it again and writes its file, `python benchmarks/performance.py` then the page.
`make bench` and `make peers` print most of it and write no file of it: `make bench` leaves out the race, other tools'
readings of a profile, and the largest profile and executed study. `make gpu-bench`, where there is a GPU, writes files
and page, without network: in ten minutes what comes first of sizes and rounds, with `MINUTES=60` all, except for the
model of 7 billion parameters, whose weights take minutes to draw (`python benchmarks/peers.py --device cuda --sizes
qwen2.5-7b`). The tools to race against are installed by `make peers-install`; one that is not there does not run, and
the others do.
"""


# What writes a file of benchmarks/results, but for where: PYTHON is that of an environment with the other tools.
COMMANDS = {
    "overhead": "overhead.py",
    "lean-step": "lean_step.py",
    "waterfall": "waterfall.py --rounds 5",
    "peers": "peers.py --rounds 6 --steps 16 --turns 6",
    "startup": "startup.py",
    "gora-throughput": "gora_throughput.py",
    "tokenisation": "tokenisation.py",
    "extraction": "extraction.py --full",
    "extraction-peers": "extraction.py --peers PYTHON",
    "report": "report.py",
    "scale": "scale.py",
    "executed": "executed.py --runs 1000 10000",
    "alternatives": "alternatives.py",
}


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    introduction = INTRODUCTION
    if not any(results.glob("*-cuda.json")):
        introduction += "No result of a GPU is among them yet.\n"
    sections = (overhead, lean_step, waterfall, peers, startup, gora, tokenisation, extraction, extraction_peers)
    sections += (report, scale, executed, alternatives, growth)
    return "\n".join([introduction, *(text for section in sections if (text := section(results)))])


def read_results(results: Path, name: str) -> dict[str, Any] | None:
    """What a benchmark found, None where it has not run."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) | {"command": _command(name)} if path.exists() else None


def _command(name: str) -> str:
    """What measures again what a file holds, and writes it."""
    benchmark, _, device = name.rpartition("-")
    words = ["python", f"benchmarks/{COMMANDS[benchmark]}", *(["--device cuda"] if device == "cuda" else [])]
    keep = "--json" if benchmark.startswith("extraction") else "--output"
    return " ".join([*words, keep, f"benchmarks/results/{name}.json"])


def _of_devices(results: Path, name: str) -> list[dict[str, Any]]:
    """What a benchmark found on each device where it ran, which is named with it."""
    found = ((device, read_results(results, f"{name}-{device}")) for device in DEVICES)
    return [{"device": device} | one for device, one in found if one is not None]


def _note(found: dict[str, Any]) -> str:
    """What a reader must know of the making of a result, if anything."""
    return f"\n{found['note']}\n" if found.get("note") else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], found: dict[str, Any]) -> str:
    """A table of what was `found`; below it the machine, and the command that measures it again."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    cpu, packages = found["environment"]["cpu"], found["environment"]["packages"]
    devices = [gpu["name"] for gpu in found["environment"]["gpus"]]
    machine = ", ".join([*devices, cpu["model"], f"{cpu['usable_cores']} cores", f"torch {packages['torch']}"])
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return f"{table}\n*{machine}.* `{found['command']}`\n"


def _interval(found: dict[str, Any], digits: int = 3) -> str:
    """An estimate with its interval, which one round alone has not."""
    middle = found.get("estimate", found.get("ratio"))
    if found["low"] is None:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def _cost(processor_s: float, peak_bytes: float) -> str:
    return f"{processor_s:.1f} s, {peak_bytes / 1e6:.0f} MB"


def overhead(results: Path) -> str:
    """What the instruments of the loop cost."""
    found = read_results(results, "overhead-cpu")
    if found is None:
        return ""
    rows = [
        ["instrumented / bare loop", _interval(found["wall"], 4), _interval(found["cpu"], 4)],
        ["bare / bare loop (null comparison)", _interval(found["null_wall"], 4), _interval(found["null_cpu"], 4)],
    ]
    return (
        "## The instruments\n\n"
        f"The training loop with its clocks, records and signs of life beside a bare PyTorch loop that does the same "
        f"work, {found['parameters'] / 1e6:.0f} million parameters, {found['blocks']} paired blocks "
        f"(`benchmarks/overhead.py`). Alone, the instruments take {found['instruments_alone_s'] * 1e6:.0f} µs a step, "
        f"{found['instruments_alone_share']:.2%} of it.\n\n"
        + _table(["step time", "by the clock", "processor time"], rows, found)
    )


def lean_step(results: Path) -> str:
    """What the step leaves out in every run."""
    tables = [_lean_step(one) for one in _of_devices(results, "lean-step")]
    introduction = (
        "## What the training step leaves out\n\n"
        "In every run, whatever its settings: one padded batch with lengths as in GSM8K, the usual way and then one "
        "thing less after the other, 9 million parameters, steps in turns. Loss and gradient norm are the same, or "
        "the benchmark fails (`benchmarks/lean_step.py`).\n\n"
    )
    return introduction + "\n".join(tables) if tables else ""


def _lean_step(found: dict[str, Any]) -> str:
    """On a GPU by the clock alone: the processor's time is not the device's."""
    clocks = ["wall"] if found["device"] == "cuda" else ["wall", "cpu"]
    rows = [
        [
            f"{row['method']}: {row['way']}",
            *(_interval(row["speed_up"][clock]) for clock in clocks),
            _interval(row["speed_up_of_the_step"][clocks[-1]]),
            f"{row['peak_allocated_bytes'] / 1e6:.0f}",
        ]
        for row in found["rows"]
    ]
    head = ["way", *["usual time / its", "in processor time"][: len(clocks)], "of the one before", "peak MB"]
    return _table(head, rows, found) + _note(found)


# What `training/packed_attention.by_document` says of attention sdpa, which the waterfall has.
PACKED = {
    "cpu": "On a CPU packed rows attend by document and come in one row without padding.",
    "cuda": "On a GPU packed rows attend under a mask of their documents and are padded to the longest row of a batch.",
}


def waterfall(results: Path) -> str:
    """What settings bring, one after the other."""
    found = _of_devices(results, "waterfall")
    introduction = (
        "## Settings that make training faster\n\n"
        "One epoch over the same rows, with lengths spread as in GSM8K; real tokens per second, padding not counted. "
        f"{' '.join(PACKED[one['device']] for one in found)} No weight moves, so every setting must have the same "
        "loss, and the benchmark fails where it has not (`benchmarks/waterfall.py`).\n\n"
    )
    return introduction + "\n".join(map(_waterfall, found)) if found else ""


def _waterfall(found: dict[str, Any]) -> str:
    head = ["setting", "tokens/s", "of the first", "of the one before", "peak MB", "loss apart"]
    return _table(head, map(_setting, found["rows"]), found) + _note(found)


def _setting(row: dict[str, Any]) -> list[str]:
    name = f"{row['method']}: {row['setting']}"
    if "error" in row:
        return [name, f"no numbers: {row['error']}", "", "", "", ""]
    speed_ups = (_interval(row[of], 2) for of in ("speed_up", "speed_up_of_the_step"))
    rate, peak = f"{row['tokens_per_second']:.0f}", f"{row['peak_bytes'] / 1e6:.0f}"
    return [name, rate, *speed_ups, peak, f"{row['loss_relative_difference']:.0e}"]


def peers(results: Path) -> str:
    """The loop beside those of others."""
    tables = [_peers(one) for one in _of_devices(results, "peers")]
    introduction = (
        "## Beside other tools\n\n"
        "Equal settings: the same model, optimizer, dtype and threads, no padding for anybody; a ratio over 1 says "
        "that TuneMap is faster (`benchmarks/peers.py`). The Trainer and TRL train on our rows and labels in our "
        "order, and how far their mean loss is from ours stands in the table. The other two do other work of the same "
        "shape, so their loss is not compared: optimum-benchmark trains on random rows of its own, under transformers "
        "4, which it needs; PEFT's loop learns the tokens of the prompt too. On a CPU all train at the same time, in "
        "turns of a few steps, so that a machine's drift falls on all alike; a round starts everybody anew, and its "
        "ratio is the median of those of turns that followed each other. What our launcher sets for its workers counts "
        "as ours: two variables of glibc (`MALLOC_MMAP_MAX_=0`, `MALLOC_TRIM_THRESHOLD_=70368744177664`), with which "
        "memory that is freed stays with the process. They are no part of the loop, and anybody can set them; "
        "`--our-allocator` sets them for all. Recommended settings: the section on settings. Tokens per second are "
        "measured from outside, over all turns, those that the machine disturbed too; beside them stands how many "
        "times as much each says of itself in a round without rests. optimum-benchmark 0.6.0 divides the samples of "
        "all its steps by the mean time of one, so what it says is as many times too high.\n\n"
    )
    return introduction + "\n".join(tables) if tables else ""


def _peers(found: dict[str, Any]) -> str:
    """On a CPU there is no peak of allocated bytes, on a GPU no processor time that says anything."""
    head = ["contestant", "rounds", "tokens/s", "says of itself", "MFU", "peak GB", "loss apart"]
    head += ["ours / its", "in processor time"]
    columns = head[:-1] if found["device"] == "cuda" else head
    table = _table(columns, (_peer(row)[: len(columns)] for row in found["rows"]), found)
    return table + _raced_with(found["rows"]) + _versions(found["rows"]) + _note(found)


def _raced_with(rows: Sequence[dict[str, Any]]) -> str:
    """The settings that all rows agree on, where they are recorded, and the ceilings that their commands measured."""
    if not any("steps" in row for row in rows):
        return ""
    steps, turns, threads = (rows[0][name] for name in ("steps", "turns", "threads"))
    allocator = "everybody" if rows[0]["our_allocator_for_all"] else "us alone"
    ceilings = sorted({f"{row['ceiling_flops_per_s'] / 1e9:,.1f}" for row in rows}, key=lambda text: (len(text), text))
    return (
        f"\nSteps: {steps}, a quarter of them warm-up; turns: {turns}; threads: {threads}; our allocator's settings: "
        f"for {allocator}; ceiling of MFU in GFLOP/s: {', '.join(ceilings)}.\n"
    )


def _versions(rows: Sequence[dict[str, Any]]) -> str:
    """What each contestant ran with, where it is recorded: once, unless its rows differ."""
    said = {}
    for row in rows:
        if versions := row.get("versions"):
            said[f"{row['contestant']}: " + ", ".join(map(" ".join, versions.items()))] = None
    return f"\nVersions of {'; of '.join(said)}.\n" if said else ""


def _peer(row: dict[str, Any]) -> list[str]:
    name = f"{row['size']}, {row['method']}: {row['contestant']}"
    if "error" in row:
        return [name, f"did not run: {row['error']}", "", "", "", "", "", "", ""]
    apart = "not compared" if (loss := row["mean_loss_relative_difference"]) is None else f"{loss:.0e}"
    peak = "" if row["peak_allocated_bytes"] is None else f"{row['peak_allocated_bytes'] / 1e9:.1f}"
    ratios = _interval(row["ratio"]), _interval(row["cpu_time_ratio"])
    rates = f"{row['tokens_per_second']:.0f}", f"{row['own_tokens_per_second_to_measured']:.2f}×"
    return [name, str(row["rounds"]), *rates, f"{row['mfu']:.0%}", peak, apart, *ratios]


def startup(results: Path) -> str:
    """What a run takes besides its steps."""
    found = read_results(results, "startup-cpu")
    if found is None:
        return ""
    head = ["rounds", "seconds", "processor seconds", "processor time / first"]
    return (
        "## Start and end of a run\n\n"
        "What a run of the smallest workload above takes besides its steps (`benchmarks/startup.py`). Ours is the "
        "whole command of the rule `train`, with launcher, gates, records, checksums and outcome; the others keep "
        "nothing, not even the model.\n\n"
        + _table(
            ["contestant", *head],
            (_start(f"{row['method']}: {row['name']}", row) for row in found["runs"]),
            found,
        )
        + _trainer_in_ours(found["runs"])
        + "\nMost of it are imports. torch, transformers and peft, imported by a process that does nothing else; a run "
        "imports them without garbage collection, without torch's compiler and scipy, and lets transformers read the "
        "sources of its models once in place of twice (`tunemap.startup`):\n\n"
        + _table(["imports", *head], (_start(row["name"], row) for row in found["imports"]), found)
        + _note(found)
    )


def _trainer_in_ours(rows: Sequence[dict[str, Any]]) -> str:
    """What to think of the Trainer's start, unless it was in an environment without our dependencies."""
    if not any(row["name"] == "trainer" and row.get("environment", "tunemap") == "tunemap" for row in rows):
        return ""
    return (
        "\nThe Trainer started in our environment and paid for what it finds there: transformers and peft import "
        "bitsandbytes and scipy where they are installed, which we need and it does not. TRL, which is the Trainer and "
        "more, started in an environment without them.\n"
    )


def _start(name: str, row: dict[str, Any]) -> list[str]:
    seconds = (f"{row[clock]:.1f}" for clock in ("wall_s", "cpu_s"))
    return [name, str(row["rounds"]), *seconds, _interval(row["cpu_time_ratio"], 2)]


def gora(results: Path) -> str:
    """GoRA's step beside LoRA's."""
    found = read_results(results, "gora-throughput-cpu")
    if found is None:
        return ""
    rows = [
        [
            "lora (null comparison)" if name == "lora" else name,
            *(_interval(one["throughput_to_lora"][clock]) for clock in ("wall", "cpu")),
            f"{one['trainable_parameters']:,}",
        ]
        for name, one in found["variants"].items()
    ]
    return (
        "## GoRA beside LoRA\n\n"
        "Training throughput over LoRA's, with about as many trained parameters (`benchmarks/gora_throughput.py`). The "
        "null comparison is of LoRA with a second LoRA: what is seen where there is no difference.\n\n"
        + _table(["variant", "of LoRA's, by the clock", "in processor time", "trained parameters"], rows, found)
    )


def extraction(results: Path) -> str:
    """Reading of profiles, as they grow."""
    found = read_results(results, "extraction-cpu")
    if found is None:
        return ""
    rows = [
        [
            f"{one['kernels']:,}",
            f"{one['file_mb']:,.0f}",
            f"{one['total_s']:.2f}",
            f"{one['processor_s']:.2f}",
            f"{one['peak_bytes'] / 1e6:.0f}",
        ]
        for one in found["sizes"]
    ]
    return (
        "## Facts of a profile\n\n"
        "All facts of an nsys export of four processes, every figure equal to the generator's truth "
        "(`benchmarks/extraction.py`).\n\n"
        + _table(["kernels", "file MB", "seconds", "processor seconds", "peak MB"], rows, found)
    )


def extraction_peers(results: Path) -> str:
    """The same events read by others."""
    found = read_results(results, "extraction-peers-cpu")
    if found is None:
        return ""
    return (
        "## Facts of a profile, beside other tools\n\n"
        f"The same {found['peers'][0]['kernels']:,} kernels of four GPUs for each, imports included; how far compute "
        "and idle time are from the truth, in milliseconds. nsys-ai counts copies as idle, by its definition "
        "(`benchmarks/extraction.py --peers`).\n\n"
        + _table(
            ["tool", "input", "seconds", "peak MB", "compute off by", "idle off by"],
            map(_extraction_peer, found["peers"]),
            found,
        )
    )


def _extraction_peer(row: dict[str, Any]) -> list[str]:
    if "failure" in row:
        return [row["tool"], row["input"], f"failed: {row['failure']}", "", "", ""]
    off = [f"{row[f'{part}_ms'] - row[f'true_{part}_ms']:+.3f}" for part in ("compute", "idle")]
    return [row["tool"], row["input"], f"{row['total_s']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}", *off]


def report(results: Path) -> str:
    """Tables, page and database, as a study grows."""
    found = read_results(results, "report-cpu")
    if found is None:
        return ""
    rows = [
        [
            f"{one['runs']:,.0f}",
            f"{one['tables_s']:.1f}",
            f"{one['page_s']:.1f}",
            f"{one['database_s']:.1f}",
            f"{one['page_bytes'] / 1e6:.1f}",
            f"{one['peak_bytes'] / 1e6:.0f}",
        ]
        for one in found["sizes"]
    ]
    return "## Report\n\nProcessor seconds, without figures (`benchmarks/report.py`).\n\n" + _table(
        ["runs", "tables", "page", "database", "page MB", "peak MB"], rows, found
    )


def scale(results: Path) -> str:
    """Plan, dry run and collection, as a study grows."""
    found = read_results(results, "scale-cpu")
    if found is None:
        return ""
    rows = [
        [
            f"{one['runs']:,}",
            *(_cost(one[stage]["processor_s"], one[stage]["peak_bytes"]) for stage in ("plan", "dry_run")),
            f"{one['collected_runs']:,}",
            _cost(one["collect"]["processor_s"], one["collect"]["peak_bytes"]),
        ]
        for one in found["sizes"]
    ]
    return (
        "## Large studies\n\n"
        "Processor time and peak memory of `tunemap plan`, `snakemake -n` and the tables (`benchmarks/scale.py`). What "
        "is collected is a made-up study of whole copies of 101 runs, at least one.\n\n"
        + _table(["runs", "plan", "dry run", "collected runs", "tables"], rows, found)
    )


def tokenisation(results: Path) -> str:
    """Rows to token ids, as the dataset grows."""
    found = read_results(results, "tokenisation-cpu")
    if found is None:
        return ""
    rows = [
        [
            f"{one['rows']:,}",
            *(f"{one['tokens'] / one[way]['processor_s']:,.0f}" for way in ("tunemap", "datasets")),
            *(f"{one[way]['peak_bytes'] / 1e6:.0f}" for way in ("tunemap", "datasets")),
            _interval(one["speed_up"], 2),
        ]
        for one in found["sizes"]
    ]
    head = ["rows", "tokens/s", "of `datasets`", "peak MB", "of `datasets`", "its processor time / ours"]
    return (
        "## Rows to token ids\n\n"
        "The workflow's stage, with its checksums and statistics, beside `datasets` (load, batched map, save), one "
        "thread, the same ids (`benchmarks/tokenisation.py`).\n\n" + _table(head, rows, found)
    )


def executed(results: Path) -> str:
    """Large studies that really ran, their runs replaced by a stub."""
    found = read_results(results, "executed-cpu")
    if found is None:
        return ""
    rows = [
        [
            f"{one['runs']:,}",
            f"{one['outcomes']:,}",
            f"{one['execute']['wall_s']:,.0f} s",
            f"{1000 * one['execute']['wall_s'] / one['runs']:.0f} ms",
            f"{one['execute']['peak_bytes'] / 1e6:.0f}",
            f"{one['nothing_to_do_s']:.0f} s",
        ]
        for one in found["sizes"]
    ]
    return (
        "## Large studies, executed\n\n"
        "The whole workflow with one job for each training and each evaluation, which a stub stands in for, to the "
        "report; then a dry run of the same command, which finds nothing to do (`benchmarks/executed.py`).\n\n"
        + _table(["runs", "outcomes", "wall time", "a run", "largest process MB", "again"], rows, found)
    )


def alternatives(results: Path) -> str:
    """Planning, tables and page beside what one would do without TuneMap."""
    found = read_results(results, "alternatives-cpu")
    if found is None:
        return ""
    planning = [
        [
            f"{row['number']}: {row['method']}",
            f"{row['published_mib']:,.0f}",
            f"{row['planned_mib']:,.0f} ({row['planned_error']:+.1%})",
            f"{row['accelerate_mib']:,.0f} ({row['accelerate_error']:+.1%})",
        ]
        for row in found["planning"]
    ]
    tables = [
        [
            f"{row['runs']:,.0f}",
            *(_cost(row[f"{name}_cpu_s"], row[f"{name}_peak_bytes"]) for name in ("tunemap", "pandas")),
        ]
        for row in found["tables"]
    ]
    pages = [[row["page"], f"{row['cpu_s']:.1f}", f"{row['bytes'] / 1e6:.2f}"] for row in found["pages"]]
    return (
        "## Beside what one would do without it\n\n"
        "`benchmarks/alternatives.py`. Peak memory that others published of one GPU, in MiB: as planned here with "
        "their settings, and as `accelerate estimate-memory` tells it of the model, which it is asked for alone.\n\n"
        + _table(["published", "MiB", "planned", "accelerate"], planning, found)
        + _note(found)
        + "\nTables of made-up studies: ours, with checksums, gates, intervals and comparisons, and ten lines of "
        "pandas that write means and deviations.\n\n"
        + _table(["runs", "TuneMap", "pandas"], tables, found)
        + "\nThe page of the default study.\n\n"
        + _table(["page", "processor seconds", "MB"], pages, found)
    )


def growth(results: Path) -> str:
    """The picture that `benchmarks/growth.py` draws of the tables above."""
    if not any(read_results(results, name) for name in ("scale-cpu", "extraction-cpu", "tokenisation-cpu")):
        return ""
    return "## Growth\n\n![Processor time and memory, as what was measured above grows](images/growth.png)\n"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text)
        return 0
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    print(f"{PAGE} is not what the results say: run python benchmarks/performance.py")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
