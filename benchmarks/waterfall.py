"""What each setting of the training loop brings: speed and memory, one setting after the other, at the same loss.

    python benchmarks/waterfall.py                   # CPU, about twenty minutes; prints the table
    python benchmarks/waterfall.py --rounds 5 --output benchmarks/results/waterfall-cpu.json
    python benchmarks/waterfall.py --device cuda --minutes 4 --output benchmarks/results/waterfall-cuda.json

One epoch over the same rows in every setting, with lengths spread as in GSM8K (log-normal; on a CPU prompts of about
110 and answers of about 130 tokens) and a vocabulary that is large for the model; on a GPU Qwen2.5-0.5B's shape.
The learning rate is so small that no weight moves, so the mean loss of a label token must be the same in all settings:
a setting that is fast because it leaves something out is caught here. Settings take turns; a ratio is taken within a
round, its interval is a t interval of its logarithm over the rounds, and of one round there is none. Every method has
its first round before one has its second, and the output is written after each run, so that a limit of time leaves
something of each. Throughput counts real tokens, never padding.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paired import TimeLimit, mean_of_rounds, shown, time_left
from peers import PRECISIONS, SIZES, Size, architecture

from tunemap import corpora, models
from tunemap.config import DatasetConfig, Factors, LocalModel, RandomModel
from tunemap.data import sources, tokens
from tunemap.files import read_json, write_json
from tunemap.measure.environment import environment
from tunemap.run import Run
from tunemap.training.launch import Paths, launch

SPREAD = 0.4  # standard deviation of the logarithm of the lengths
# Relative difference of losses: float32 sums in another order; bfloat16 rounds each product to 8 bits (2^-9 of it).
ALLOWED = {"float32": 1e-5, "bfloat16": 2e-3}
STILL = 1e-12  # a learning rate that moves no weight


@dataclass(frozen=True)
class Scale:
    """What is trained: a model, so many rows, padded batches of size.rows of them, median tokens of both parts.

    Rows make whole batches of `size.rows`, and packed whole batches of half as many, so that none is left out.
    """

    size: Size
    rows: int
    prompt: int
    answer: int


SCALES = {
    "cpu": Scale(Size(architecture(256, 6, 16384), 4, 512), rows=56, prompt=110, answer=130),
    "cuda": Scale(SIZES["cuda"]["qwen2.5-0.5b"], rows=112, prompt=440, answer=520),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "padded to max_length": {"batching": "fixed_length"},
    "padded to the longest": {"batching": "longest"},
    "similar lengths together": {"batching": "length_grouped"},
    "packed": {"batching": "packed"},
    "packed, logits of labels": {"batching": "packed", "logits": "label_tokens"},
    "the same, compiled": {"batching": "packed", "logits": "label_tokens", "compile": True},
}
FIRST = next(iter(SETTINGS))
Found = dict[str, list[dict[str, Any]]]  # what `measure` says of each setting, round by round


def prepare(folder: Path, scale: Scale) -> None:
    """Model, rows and tokens in `folder`."""
    (folder / "architecture").mkdir(parents=True)
    (folder / "architecture" / "config.json").write_text(json.dumps(scale.size.config))
    corpora.build_arithmetic_tokenizer().save_pretrained(folder / "tokenizer")
    model = RandomModel(source="random", config="architecture", tokenizer="tokenizer")
    models.prepare(model, folder / "model", data_root=folder)
    rng = np.random.default_rng(0)

    def digits(median: int) -> str:
        count = min(scale.size.length // 2 - 20, round(median * float(rng.lognormal(0.0, SPREAD))))
        return "".join(map(str, rng.integers(0, 10, count)))  # a token each

    for name, count in (("train", scale.rows), ("test", 1)):
        rows = [{"prompt": digits(scale.prompt), "answer": digits(scale.answer)} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "train_file": "train.jsonl",
        "test_file": "test.jsonl",
        "prompt_field": "prompt",
        "answer_field": "answer",
    }
    dataset = DatasetConfig(task="generation", source="file", **fields)
    sources.prepare(dataset, folder / "dataset", data_root=folder)
    tokens.tokenize(
        folder / "dataset",
        folder / "model",
        folder / "tokens",
        max_length=scale.size.length,
        prompt_template=None,
        system_prompt=None,
    )


def run_of(scale: Scale, method: str, threads: int, setting: dict[str, Any]) -> Run:
    """One epoch in a setting."""
    factors = {
        "per_device_batch_size": scale.size.rows // 2 if setting["batching"] == "packed" else scale.size.rows,
        "max_length": scale.size.length,
        "precision": PRECISIONS[scale.size.dtype],
        "epochs": 1.0,
        "learning_rate": STILL,
        "threads_per_process": threads,
        "measurement_warmup_steps": 2,
    }
    return Run.model_validate(
        {
            "id": "waterfall",
            "model_name": "made",
            "model": LocalModel(source="local", path="model"),
            "dataset_name": "rows",
            "dataset": DatasetConfig(task="generation", source="local", path="dataset", accept_truncation=True),
            "method_name": method,
            "method": {"kind": "lora", "rank": 16} if method == "lora" else {"kind": "full"},
            "prompt_template": None,
            "factors": Factors(**(factors | setting)),
        }
    )


def measure(run: Run, prepared: Path, device: str) -> dict[str, Any]:
    """Train once: real tokens per second, peak memory, and the mean loss of a label token; or an error."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folders = {one: prepared / one for one in ("model", "dataset", "tokens")}
        paths = Paths(**folders, work=work / "work", weights=work / "weights", steps=work / "steps.csv",
                      outcome=work / "outcome.json")  # fmt: skip
        if launch(run, paths, device=device):
            sys.exit("stopped")
        outcome = read_json(paths.outcome)
        if outcome["outcome"] != "ok":
            return {"error": f"{outcome['outcome']}: {outcome['reason']}"}
        with paths.steps.open() as file:
            steps = list(csv.DictReader(file))
    labels = [int(step["label_tokens"]) for step in steps]
    losses = [float(step["loss"]) for step in steps]
    measured = outcome["measurements"]
    return {
        "tokens_per_second": measured["tokens_per_second"],
        "peak_bytes": measured["peak_allocated_bytes"],
        "label_tokens": sum(labels),
        "loss": float(np.average(losses, weights=labels)),
    }


def waterfall(
    methods: list[str], prepared: Path, device: str, rounds: int, threads: int, limit: TimeLimit
) -> Iterator[list[dict[str, Any]]]:
    """The table after each run: all settings `rounds` times in turn, until the limit. Who fails has no further runs."""
    scale = SCALES[device]
    found: dict[str, Found] = {method: {name: [] for name in SETTINGS} for method in methods}
    parts = [(turn, method, name) for turn in range(rounds) for method in methods for name in _order(turn)]
    began = time.perf_counter()
    for done, (turn, method, name) in enumerate(parts, start=1):
        if any("error" in run for run in found[method][name]):
            continue
        if not limit.another():
            print(f"no time for the last {len(parts) + 1 - done} of {len(parts)} runs")
            return
        found[method][name].append(measure(run_of(scale, method, threads, SETTINGS[name]), prepared, device))
        print(f"{method}, round {turn + 1}/{rounds}: {name}, {time_left(began, done, len(parts))}", flush=True)
        yield [row for one in methods for row in rows_of(one, found[one], ALLOWED[scale.size.dtype])]


def _order(turn: int) -> list[str]:
    return list(SETTINGS) if turn % 2 == 0 else list(reversed(SETTINGS))


def rows_of(method: str, found: Found, allowed: float) -> list[dict[str, Any]]:
    """What is known of each setting, against the first and against the one before it that did the same work."""
    rows, before = [], FIRST
    for name, runs in found.items():
        if not runs:
            continue
        row: dict[str, Any] = {"method": method, "setting": name}
        if error := _error(runs, found[FIRST], allowed):
            rows.append(row | {"error": error})
            continue
        row |= {
            "rounds": len(runs),
            "tokens_per_second": float(np.median([run["tokens_per_second"] for run in runs])),
            "peak_bytes": runs[0]["peak_bytes"],
            "loss_relative_difference": _apart(runs[0], found[FIRST][0]),
            "speed_up": _ratio(runs, found[FIRST]),
            "speed_up_of_the_step": _ratio(runs, found[before]),
        }
        rows.append(row)
        before = name
    return rows


def _error(runs: list[dict[str, Any]], first: list[dict[str, Any]], allowed: float) -> str | None:
    """Why a setting has no numbers: it failed, the first did, or it is not the same work."""
    if failed := [run["error"] for run in [*runs, *first] if "error" in run]:
        return str(failed[0])
    apart = _apart(runs[0], first[0])
    if apart <= allowed and runs[0]["label_tokens"] == first[0]["label_tokens"]:
        return None
    return f"the loss differs by {apart:.1e} from that of '{FIRST}': not the same work"


def _apart(run: dict[str, Any], first: dict[str, Any]) -> float:
    return float(abs(run["loss"] / first["loss"] - 1))


def _ratio(above: list[dict[str, Any]], below: list[dict[str, Any]]) -> dict[str, float | None]:
    """Of the throughputs, over the rounds that both have had."""
    return mean_of_rounds([a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(above, below, strict=False)])


def show(table: list[dict[str, Any]]) -> None:
    """Print the table."""
    columns = f"{'method':6s} {'setting':26s} {'tokens/s':>8s}"
    print(f"\n{columns}  {'of the first':22s} {'of the one before':22s} {'peak MB':>7s}")
    for row in table:
        start = f"{row['method']:6s} {row['setting']:26s}"
        if "error" in row:
            print(f"{start} no numbers: {row['error']}")
            continue
        first, before = (shown(row[name], 2) for name in ("speed_up", "speed_up_of_the_step"))
        rate, peak = f"{row['tokens_per_second']:8.0f}", f"{row['peak_bytes'] / 1e6:7.1f}"
        print(f"{start} {rate}  {first:22s} {before:22s} {peak}")


def main() -> None:
    """Read the command line, measure, print and keep the table; fails where a setting has no numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SCALES), default="cpu")
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="begin no run that is not done in so many (default: no limit)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="json file to keep the results in")
    parser.add_argument("--note", help="what a reader of the results must know of their making; kept with them")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # leave no folder behind
    limit, device = TimeLimit(arguments.minutes), arguments.device
    described = environment(Path(__file__).resolve().parents[1]).as_dict()
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared"
        prepare(prepared, SCALES[device])
        for table in waterfall(arguments.methods, prepared, device, arguments.rounds, arguments.threads, limit):
            if arguments.output:  # at once: the rest takes long, and may not come to its end
                write_json(arguments.output, {"rows": table, "note": arguments.note, "environment": described})
    show(table)
    if any("error" in row for row in table):
        sys.exit("a setting has no numbers")


if __name__ == "__main__":
    main()
