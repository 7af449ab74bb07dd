"""`tunemap methods`: every fine-tuning method by name, what it trains, and what does not run and why."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from tunemap.methods.gora import METHODS, GoraSettings
from tunemap.methods.peft_registry import SUPPORTED, UNSUPPORTED
from tunemap.methods.sharding import UNSHARDABLE

KINDS = {
    "full": "every parameter is trained",
    "lora": "low-rank adapters; rank, alpha, rslora, learning_rate_ratio (LoRA+)",
    "qlora": "the same over a base in 4 bits",
}


def add_methods_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run_methods(arguments: argparse.Namespace) -> int:
    """Print the table."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=300)  # a reason folded in two is hard to search
    console.print(methods_table())
    return 0


def methods_table() -> Table:
    """One row per method: as a study names it, whether it trains, shards over devices, and what it is."""
    table = Table("method", "trains", "fsdp, hybrid", "what is trained, or why it is not", box=None, pad_edge=False)
    for kind, summary in KINDS.items():
        table.add_row(f"kind: {kind}", "yes", "yes", summary)
    for variant, settings in METHODS.items():
        table.add_row(f"kind: gora, variant: {variant}", "yes", "yes", _summary(settings))
    for name, method in SUPPORTED.items():
        limits = [f"tasks: {', '.join(method.tasks)}"] if len(method.tasks) == 1 else []
        limits += [f"models: {', '.join(method.model_types)}"] if method.model_types else []
        limits += ["classifies with encoders only"] if method.hides_padding else []
        limits += [f"not sharded: {UNSHARDABLE[name]}"] if name in UNSHARDABLE else []
        shards = "no" if name in UNSHARDABLE else "yes"
        table.add_row(f"kind: peft, type: {name}", "yes", shards, "; ".join([method.summary, *limits]))
    for name, reason in UNSUPPORTED.items():
        table.add_row(f"peft type {name}", "no", "no", reason)
    return table


def _summary(settings: GoraSettings) -> str:
    ranks = "one rank" if settings.allocation == "uniform" else f"ranks by importance ({settings.allocation})"
    scaling = "alpha/√rank" if settings.rank_stabilised else "alpha/rank"
    ratio = f", B learns {settings.learning_rate_ratio:g} times as fast" if settings.learning_rate_ratio != 1 else ""
    return f"{ranks}, start {settings.initialisation}, scaling {scaling}{ratio}"
