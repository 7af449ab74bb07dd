"""Predicted against tracked memory: 50 ways to train a small model, each planned without contents and then trained.

    python benchmarks/planner.py                # writes benchmarks/results/planner-cpu.csv; about five minutes
    python benchmarks/planner.py --only fsdp    # those whose name holds the word; the other rows stay
    python benchmarks/planner.py --published    # peaks that others published, planned with their settings and flaws
    python benchmarks/planner.py --large        # how long planning takes for 1.5, 7 and 70 billion parameters

Predicted is what `tunemap plan` would print of a run whose tokens are there; tracked is what the live-storage tracker
saw in training, through the launcher and in as many processes as the run asks for. Both are of the rank that needs
most.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from paired import time_left
from rich.console import Console
from rich.table import Table

from tunemap.config import DatasetConfig, Factors, RandomModel
from tunemap.files import read_json, write_atomic
from tunemap.run import Run

RESULTS = Path(__file__).resolve().parent / "results" / "planner-cpu.csv"
ALLOWED = 0.02
ARCHITECTURE = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
MODEL = RandomModel(source="random", config="qwen2", tokenizer="arithmetic")
DATASET = DatasetConfig(task="arithmetic", source="made", train_rows=48, test_rows=8)
COMMON: dict[str, Any] = {
    "per_device_batch_size": 4,
    "max_length": 96,
    "max_steps": 12,
    "epochs": None,
    "logging_steps": 4,
    "measurement_warmup_steps": 2,
    "learning_rate": 0.001,
}
FULL, LORA, QLORA = {"kind": "full"}, {"kind": "lora"}, {"kind": "qlora"}
GORA = {"kind": "gora", "estimation_batches": 4}


def configurations() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, method and factors of each."""
    for precision in ("fp32", "bf16", "pure_bf16"):
        for checkpointing in (False, True):
            factors = {"precision": precision, "gradient_checkpointing": checkpointing}
            suffix = f"{precision}{' checkpointed' if checkpointing else ''}"
            yield f"full {suffix}", FULL, factors
            if precision != "pure_bf16":
                yield f"lora {suffix}", LORA, factors
                yield f"qlora {suffix}", QLORA, factors
    yield "full fp16", FULL, {"precision": "fp16"}
    yield "gora", GORA, {}
    yield "gora checkpointed", GORA, {"gradient_checkpointing": True}
    yield "gora 4-bit, dequantised", GORA | {"quantization_type": "nf4", "route": "dequantised"}, {}
    yield "gora_hpml", GORA | {"variant": "gora_hpml"}, {}
    for optimizer in ("adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "galore_adamw"):
        yield f"full {optimizer}", FULL, {"optimizer": optimizer}
    for optimizer in ("lomo", "adalomo"):
        yield f"full {optimizer}", FULL, {"optimizer": optimizer, "max_grad_norm": None}
    yield "lora adamw_8bit", LORA, {"optimizer": "adamw_8bit"}
    yield "full eager", FULL, {"attention": "eager"}
    yield "lora eager checkpointed", LORA, {"attention": "eager", "gradient_checkpointing": True}
    yield "full label_tokens", FULL, {"logits": "label_tokens"}
    yield "lora bf16 label_tokens", LORA, {"logits": "label_tokens", "precision": "bf16"}
    yield "full fsdp 2 label_tokens", FULL, {"logits": "label_tokens", "strategy": "fsdp", "gpus": 2}
    yield "full packed", FULL, {"batching": "packed", "per_device_batch_size": 2}
    yield "lora fixed_length", LORA, {"batching": "fixed_length"}
    yield "full one row", FULL, {"per_device_batch_size": 1, "max_steps": 60}
    yield "full 3 micro-batches", FULL, {"gradient_accumulation": 3, "batching": "fixed_length"}
    yield "lora 3 micro-batches", LORA, {"gradient_accumulation": 3, "batching": "fixed_length"}
    for kind in ("DORA", "VERA", "LOHA", "IA3", "OFT", "PROMPT_TUNING"):
        yield f"peft {kind}", {"kind": "peft", "type": kind}, {}
    for strategy, gpus in (("ddp", 2), ("fsdp", 2)):
        for method in (FULL, LORA, QLORA):
            yield f"{method['kind']} {strategy} {gpus}", method, {"strategy": strategy, "gpus": gpus}
    yield "full ddp 4", FULL, {"strategy": "ddp", "gpus": 4}
    yield "full fsdp 4", FULL, {"strategy": "fsdp", "gpus": 4}
    bf16 = {"precision": "bf16", "gradient_checkpointing": True}
    yield "full fsdp 4 bf16 checkpointed", FULL, {"strategy": "fsdp", "gpus": 4} | bf16
    yield "full fsdp 2 adamw_8bit", FULL, {"strategy": "fsdp", "gpus": 2, "optimizer": "adamw_8bit"}
    yield "full hybrid 4", FULL, {"strategy": "hybrid", "gpus": 4}
    yield "lora hybrid 4", LORA, {"strategy": "hybrid", "gpus": 4}


def make_run(name: str, method: dict[str, Any], factors: dict[str, Any], model: Any = MODEL) -> Run:
    """The run of a configuration."""
    return Run.model_validate(
        {
            "id": name,
            "model_name": "small",
            "model": model,
            "dataset_name": "arithmetic",
            "dataset": DATASET,
            "method_name": method["kind"],
            "method": method,
            "prompt_template": None,
            "factors": Factors(**(COMMON | factors)),
        }
    )


def prepare(root: Path) -> tuple[Path, Path, Path]:
    """Folders of the model, its rows and their tokens."""
    from tunemap import corpora, models
    from tunemap.data import sources
    from tunemap.data.tokens import tokenize

    (root / "qwen2").mkdir()
    (root / "qwen2" / "config.json").write_text(json.dumps(ARCHITECTURE))
    corpora.build_arithmetic_tokenizer().save_pretrained(root / "arithmetic")
    folders = root / "model", root / "dataset", root / "tokens"
    models.prepare(MODEL, folders[0], data_root=root)
    sources.prepare(DATASET, folders[1], data_root=None)
    tokenize(folders[1], folders[0], folders[2], max_length=96, prompt_template=None, system_prompt=None)
    return folders


def compare(name: str, method: dict[str, Any], factors: dict[str, Any], root: Path, folders: Any) -> dict[str, Any]:
    """One row: the plan of a configuration beside what its training was seen to need."""
    from tunemap.planner.cache import NoAccount
    from tunemap.planner.data import data_of
    from tunemap.planner.device import Target
    from tunemap.planner.plan import make_account
    from tunemap.training.launch import Paths, launch

    run = make_run(name, method, factors)
    results = root / "results"
    tokens = results / "shared" / "tokens" / run.tokens_key
    if not tokens.exists():
        tokens.parent.mkdir(parents=True, exist_ok=True)
        tokens.symlink_to(folders[2])
    target = Target("cpu", on_gpu=False, memory_bytes=None, hardware=None)
    account = make_account(run, data_of(run, results), target, data_root=root, results=results)
    if isinstance(account, NoAccount):
        return {"configuration": name, "reason": account.reason}
    work = Path(tempfile.mkdtemp(dir=root))
    paths = Paths(*folders, work / "work", work / "weights", work / "steps.csv", work / "outcome.json", None)
    launch(run, paths, device="cpu")
    outcome = read_json(paths.outcome)
    measured = outcome["measurements"]
    tracked = measured.get("peak_allocated_bytes")
    return {
        "configuration": name,
        "strategy": run.factors.strategy,
        "gpus": run.factors.gpus,
        "predicted_peak_bytes": account.peak_bytes,
        "tracked_peak_bytes": tracked,
        "error": round(account.peak_bytes / tracked - 1, 6) if tracked else None,
        **_at_decided_ranks(run, root, results, outcome, tracked),
        "predicted_estimation_bytes": account.estimation_peak_bytes,
        "tracked_estimation_bytes": measured.get("estimation_peak_bytes"),
        "predicted_communication_bytes": account.communication_bytes,
        "counted_communication_bytes": measured.get("communication_bytes_per_step"),
        "planning_s": account.seconds,
        "reason": outcome["reason"] if not tracked else None,
    }


def _at_decided_ranks(
    run: Run, root: Path, results: Path, outcome: dict[str, Any], tracked: int | None
) -> dict[str, Any]:
    """The prediction for ranks that data decide, once they are known; empty columns for all other methods."""
    from tunemap.planner import memory
    from tunemap.planner.data import data_of
    from tunemap.planner.models import architecture_of

    decided = outcome["facts"].get("gora")
    peak, error = None, None
    if decided is not None and tracked:
        config = architecture_of(run.model, results / "model", root)
        data = data_of(run, results)
        with mock.patch.object(memory, "_uniform_plan", return_value=decided):
            peak = memory.account(run, config, data.batch, num_labels=None, on_gpu=False).peak_bytes
        error = round(peak / tracked - 1, 6)
    return {"predicted_at_decided_ranks_bytes": peak, "error_at_decided_ranks": error}


def run_all(only: str | None) -> int:
    """Compare, print and keep; the exit code says whether every error is allowed."""
    chosen = [one for one in configurations() if only is None or only in one[0]]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        folders = prepare(root)
        began = time.perf_counter()
        for number, (name, method, factors) in enumerate(chosen, 1):
            rows.append(compare(name, method, factors, root, folders))
            said = rows[-1].get("reason") or f"{rows[-1]['error']:+.3%}"
            left = time_left(began, number, len(chosen))
            print(f"{number}/{len(chosen)} {name}: {said}, {left}", file=sys.stderr, flush=True)
    table = Table(title="Peak memory of a step", title_justify="left")
    for column in ("configuration", "predicted", "tracked", "error"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for row in rows:
        if row.get("reason"):
            table.add_row(row["configuration"], "", "", row["reason"])
        else:
            predicted, tracked = row["predicted_peak_bytes"], row["tracked_peak_bytes"]
            table.add_row(row["configuration"], f"{predicted:,}", f"{tracked:,}", f"{row['error']:+.3%}")
    console = Console(width=120)
    console.print(table)
    for row in rows:
        if row.get("error_at_decided_ranks") is not None:
            console.print(
                f"{row['configuration']}, at the ranks that its data decided: {row['error_at_decided_ranks']:+.3%}"
            )
    errors = [abs(_error(row)) for row in rows if row.get("error") is not None]
    console.print(f"{len(errors)} configurations, largest error {max(errors):.3%}, {errors.count(0)} equal to the byte")
    if only is None or RESULTS.is_file():
        rows = _beside_older(rows) if only else rows
        text = io.StringIO()
        writer = csv.DictWriter(text, list(max(rows, key=len)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(RESULTS, text.getvalue())
    return 0 if len(errors) == len(rows) and max(errors) < ALLOWED else 1


def _error(row: dict[str, Any]) -> float:
    """Of a prediction that had all it may know: data decide GoRA's ranks, which no plan can."""
    decided = row.get("error_at_decided_ranks")
    return float(row["error"] if decided is None else decided)


def _beside_older(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the file, those made now in the place of their older ones."""
    new = {row["configuration"]: row for row in rows}
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return [new.get(row["configuration"], row) for row in csv.DictReader(file)]


LARGE = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "70B": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192,
            "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
LARGE_RUNS = {
    "full": (FULL, {"precision": "pure_bf16"}),
    "lora": (LORA, {"precision": "bf16"}),
    "qlora checkpointed": (QLORA, {"precision": "bf16", "gradient_checkpointing": True}),
    "full fsdp 8": (FULL, {"precision": "bf16", "gradient_checkpointing": True, "strategy": "fsdp", "gpus": 8}),
}


def run_large(size: str) -> int:
    """Plan the runs of one size in this process; imports count apart. CPU time is that of one thread."""
    began = time.process_time()
    import torch

    from tunemap.models.loading import build_config
    from tunemap.planner.memory import account
    from tunemap.planner.prediction import BatchShape

    torch.set_num_threads(1)
    imports_s = time.process_time() - began
    config = build_config({**ARCHITECTURE, "max_position_embeddings": 32768, **LARGE[size]}, Path(size))
    for name, (method, factors) in LARGE_RUNS.items():
        run = make_run(name, method, factors | {"per_device_batch_size": 8, "max_length": 256})
        began = time.process_time()
        found = account(run, config, BatchShape(8, 256, False), num_labels=None, on_gpu=True)
        planned_s = time.process_time() - began
        peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{size:>5} {name:20} {found.peak_bytes / 2**30:8.2f} GiB, {found.total_parameters / 1e9:.2f} billion "
            f"parameters, planned in {planned_s:.1f} s of one core ({found.seconds:.1f} s by the clock; imports "
            f"{imports_s:.1f} s before it) with {peak_rss:.0f} MB",
            flush=True,
        )
    return 0


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="only configurations whose name holds this; the other rows stay")
    parser.add_argument("--published", action="store_true", help="compare with published peaks instead")
    parser.add_argument("--large", action="store_true", help="plan large models instead")
    parser.add_argument("--size", choices=LARGE, help="one size of --large, in this process")
    arguments = parser.parse_args()
    if arguments.published:
        from published_memory import compare_published

        return compare_published()
    if arguments.size:
        return run_large(arguments.size)
    if arguments.large:  # a process each, so that each has its own peak
        for size in LARGE:
            subprocess.run([sys.executable, __file__, "--size", size], check=True, env=os.environ)
        return 0
    return run_all(arguments.only)


if __name__ == "__main__":
    sys.exit(main())
