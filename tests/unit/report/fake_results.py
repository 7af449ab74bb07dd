"""A made-up results tree for tests: invented numbers in real file formats, the same for the same arguments.

Nothing here was measured. `write` makes plan.json and results of a study with a base row, several methods and seeds,
two experiments that share runs, and one run each that ended oom, invalid and unsupported.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACTORS: dict[str, Any] = {
    "strategy": "single",
    "gpus": 1,
    "per_device_batch_size": 8,
    "gradient_accumulation": 1,
    "max_length": 512,
    "batching": "longest",
    "precision": "fp32",
    "gradient_checkpointing": False,
    "attention": "sdpa",
    "compile": False,
    "optimizer": "adamw",
    "learning_rate": 0.001,
    "weight_decay": 0.0,
    "schedule": "linear",
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "max_steps": 60,
    "epochs": None,
    "seed": 0,
    "threads_per_process": 1,
    "measurement_warmup_steps": 5,
    "logging_steps": 10,
    "checkpoint_steps": None,
    "time_limit_minutes": None,
    "evaluation_batch_size": 64,
    "max_new_tokens": None,
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 8, "alpha": None, "dropout": 0.0, "target_modules": "all-linear"},
    "qlora": {"kind": "qlora", "rank": 8, "alpha": None, "dropout": 0.0, "quantization_type": "nf4"},
}
LEARNING_RATE = {"full": 0.001, "lora": 0.005, "qlora": 0.005}
ACCURACY = {"full": 0.90, "lora": 0.88, "qlora": 0.84}
SPEED = {"full": 52_000.0, "lora": 61_000.0, "qlora": 41_000.0}
MEGABYTES = {  # parameters, gradients, optimizer, activations, other
    "full": (40, 40, 80, 30, 4),
    "lora": (42, 2, 4, 34, 4),
    "qlora": (12, 2, 4, 36, 6),
}
PARTS = ("parameters", "gradients", "optimizer", "activations", "other")


@dataclass(frozen=True)
class Fake:
    """Where a made-up study lies."""

    plan_path: Path
    results_dir: Path

    @property
    def plan(self) -> dict[str, Any]:
        """The plan as it is on disk."""
        return json.loads(self.plan_path.read_text())

    def build(self, output: Path) -> None:
        """From result files to the page, as the workflow's rules do one after the other."""
        from tunemap.collect import write_tables
        from tunemap.report.figures import write_figures
        from tunemap.report.page import write_report

        write_tables(self.plan_path, self.results_dir)
        write_figures(self.results_dir / "tables", self.results_dir / "figures", self.plan_path)
        write_report(self.plan_path, self.results_dir, output)

    def outcome(self, run: str) -> Path:
        """outcome.json of a run."""
        return self.results_dir / "runs" / run / "outcome.json"

    def evaluation(self, run: str) -> Path:
        """evaluation.json of a run."""
        return self.results_dir / "evaluations" / run / "evaluation.json"

    def edit(self, path: Path, **changes: Any) -> None:
        """Replace keys of a JSON file."""
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _planned(method: str, rank: int | None, checkpointing: bool, seed: int) -> dict[str, Any]:
    parameters = dict(METHODS.get(method, {"kind": "base"}))
    name = f"tiny.arithmetic.{method}"
    if rank is not None and "rank" in parameters:
        parameters["rank"] = rank
        name += f".rank-{rank}" if rank != 8 else ""
    factors = FACTORS | {"gradient_checkpointing": checkpointing, "seed": seed}
    provenance = dict.fromkeys(factors, "built-in default") | {"method": "vary"}
    if method in LEARNING_RATE:
        factors["learning_rate"] = LEARNING_RATE[method]
        provenance["learning_rate"] = f"method {method}"
    name += ".gradient_checkpointing-true" if checkpointing else ""
    name += f".seed-{seed}" if method != "base" else ".max_length-512"
    spec = {
        "model_name": "tiny",
        "model": {"source": "tiny", "architecture": "qwen2", "seed": 0},
        "dataset_name": "arithmetic",
        "dataset": {"task": "arithmetic", "source": "made"},
        "method_name": method,
        "method": parameters,
        "factors": factors,
    }
    return {"id": name, **spec, "digest": _digest(spec), "evaluation_digest": _digest([spec]), "provenance": provenance}


def plan(seeds: int, ranks: tuple[int, ...]) -> dict[str, Any]:
    """A plan of two experiments: `methods` (method × checkpointing) and `ranks`, which shares the LoRA runs."""
    base = _planned("base", None, False, 0)
    grid = [(method, gc) for method in METHODS for gc in (False, True)]
    methods = [_planned(method, 8, gc, seed) for method, gc in grid for seed in range(seeds)]
    ladder = [_planned("lora", rank, False, seed) for rank in ranks for seed in range(seeds)]
    for run in ladder:
        run["provenance"] = run["provenance"] | {"method.rank": "vary"}
    return {
        "study": "fake",
        "data_root": None,
        "report": {"title": "A made-up study", "introduction": "Invented numbers.", "baseline_method": "full"},
        "hardware": {"device": "auto", "description": None},
        "prompt_templates": {},
        "experiments": [
            {
                "name": "methods",
                "question": "Which method should be used?",
                "vary": ["method", "gradient_checkpointing"],
                "runs": [run["id"] for run in methods],
                "base_runs": [base["id"]],
            },
            {
                "name": "ranks",
                "question": "Which rank is enough?",
                "vary": ["method.rank"],
                "runs": [run["id"] for run in ladder],
                "base_runs": [base["id"]],
            },
        ],
        "runs": {run["id"]: run for run in [*methods, base, *ladder]},
    }


def write(
    root: Path, seeds: int = 3, ranks: tuple[int, ...] = (2, 8, 32), examples: int = 200, failures: bool = True
) -> Fake:
    """Write the plan and all results below `root`."""
    fake = Fake(root / "plan.json", root / "results" / "fake")
    made = plan(seeds, ranks)
    root.mkdir(parents=True, exist_ok=True)
    fake.plan_path.write_text(json.dumps(made))
    failing = {}
    if failures:
        last = seeds - 1
        failing = {
            f"tiny.arithmetic.full.seed-{last}": ("oom", "asked for 96 MiB, 12 MiB free"),
            f"tiny.arithmetic.lora.gradient_checkpointing-true.seed-{last}": ("invalid", "labels: 3 % of answers cut"),
        }
        for seed in range(seeds):
            failing[f"tiny.arithmetic.qlora.gradient_checkpointing-true.seed-{seed}"] = (
                "unsupported",
                "qlora needs bitsandbytes",
            )
    difficulty = [random.Random(f"example {i}").gauss(0, 1.2) for i in range(examples)]
    for run in made["runs"].values():
        outcome, reason = failing.get(run["id"], ("ok", None))
        _write_run(fake, run, outcome, reason)
        _write_evaluation(fake, run, outcome, difficulty)
    return fake


def _write_run(fake: Fake, run: dict[str, Any], outcome: str, reason: str | None) -> None:
    noise = random.Random(run["id"])
    method, factors = run["method_name"], run["factors"]
    measurements: dict[str, Any] = {}
    if outcome in ("ok", "invalid") and method != "base":
        slower = 0.74 if factors["gradient_checkpointing"] else 1.0
        speed = SPEED[method] * slower * math.exp(noise.gauss(0, 0.01))
        parts = [value * 1_000_000 for value in MEGABYTES[method]]
        parts[3] //= 3 if factors["gradient_checkpointing"] else 1
        step = 4096 / speed
        rows = _steps(noise, method, run["method"].get("rank", 64), step)
        measurements = {
            "steps": 60,
            "measured_steps": 55,
            "step_time_mean_s": step,
            "step_time_median_s": step,
            "step_time_p95_s": step * 1.1,
            "step_time_sd_s": step * 0.05,
            "step_time_cv": 0.05,
            "data_time_mean_s": 0.0,
            "forward_time_mean_s": step * 0.3,
            "backward_time_mean_s": step * 0.6,
            "optimizer_time_mean_s": step * 0.1,
            "tokens_per_second": speed,
            "samples_per_second": speed / 512,
            "peak_allocated_bytes": sum(parts),
            "peak_reserved_bytes": sum(parts) + 2_000_000,
            **{f"{part}_bytes": value for part, value in zip(PARTS, parts, strict=True)},
            "train_loss": rows[-1]["loss"],
            "trainable_parameters": 131_648 if method == "full" else 2_048 * run["method"]["rank"],
            "total_parameters": 131_648,
            "train_time_s": step * 60,
            "wall_time_s": step * 60 + 5,
            "load_time_s": 4.5,
            "compile_time_s": None,
            "data_order_hash": f"order-{factors['seed']}",
            "tokens": 245_760,
            "samples": 480,
        }
        path = fake.outcome(run["id"]).parent / "steps.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    gates = [{"gate": "labels", "passed": outcome != "invalid", "fatal": True, "message": reason or "all have labels"}]
    spec = {key: run[key] for key in ("model_name", "dataset_name", "method_name", "method", "factors")}
    fake.outcome(run["id"]).parent.mkdir(parents=True, exist_ok=True)
    document = {
        "run": run["id"],
        "digest": run["digest"],
        "outcome": outcome,
        "reason": reason,
        "phase": None if outcome == "ok" else "train",
        "step": 7 if outcome == "oom" else None,
        "rank": None,
        "started_at": "2026-01-01T00:00:00+00:00",
        "spec": spec,
        "measurements": measurements,
        "gates": gates if method != "base" else [],
        "environment": {
            "cpu": {"model": "Made-up CPU"},
            "gpus": [],
            "python": "3.11.0",
            "packages": {"torch": "0.0", "peft": "0.0"},
        },
    }
    fake.outcome(run["id"]).write_text(json.dumps(document))


def _steps(noise: random.Random, method: str, rank: int, step_time: float) -> list[dict[str, Any]]:
    floor, pace = {"full": (0.2, 14), "lora": (0.25, 18), "qlora": (0.33, 20)}[method]
    pace *= 1 + 4 / rank
    return [
        {
            "rank": 0,
            "step": step,
            "epoch": step / 60,
            "learning_rate": 0.001,
            "loss": floor + 3 * math.exp(-step / pace) + abs(noise.gauss(0, 0.04)),
            "gradient_norm": 1.0,
            "samples": 8,
            "real_tokens": 4096,
            "label_tokens": 800,
            "padded_tokens": 4300,
            "step_time_s": step_time,
            "elapsed_s": step * step_time,
            "measured": int(step > 5),
        }
        for step in range(1, 61)
    ]


def _write_evaluation(fake: Fake, run: dict[str, Any], outcome: str, difficulty: list[float]) -> None:
    path = fake.evaluation(run["id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"run": run["id"], "digest": run["evaluation_digest"], "training_digest": run["digest"]}
    if outcome != "ok":
        path.write_text(json.dumps(head | {"outcome": "skipped", "reason": f"training ended {outcome}"}))
        return
    noise = random.Random(f"answers of {run['id']}")
    method = run["method_name"]
    level = 0.1 if method == "base" else ACCURACY[method] - 0.5 / run["method"].get("rank", 64)
    shift = 1.6 * math.log(level / (1 - level)) + (0 if method == "base" else noise.gauss(0, 0.1))
    rows = []
    for number, hard in enumerate(difficulty):
        correct = noise.random() < 1 / (1 + math.exp(-(shift - hard)))
        rows.append(
            {"id": f"arithmetic-test-{number}", "prompt": "?", "reference": "7", "output": "7", "correct": correct}
        )
    (path.parent / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    n, right = len(rows), sum(row["correct"] for row in rows)
    share, z = right / n, 1.959963984540054
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    document = {
        "outcome": "ok",
        "reason": None,
        "task": "arithmetic",
        "task_kind": "generation",
        "split": "test",
        "metric": "exact_match_strict",
        "n": n,
        "correct": right,
        "accuracy": share,
        "accuracy_low": (centre - half) / (1 + z * z / n),
        "accuracy_high": (centre + half) / (1 + z * z / n),
        "accuracy_flexible": share,
        "malformed_share": 0.01,
        "truncated_share": 0.0,
        "max_new_tokens": 32,
        "evaluation_time_s": 1.5,
    }
    path.write_text(json.dumps(head | document))
