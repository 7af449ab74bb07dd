"""`tunemap advise`: what fits a model on given GPUs, what to choose, and a study file of it.

tunemap advise --model Qwen/Qwen2.5-1.5B-Instruct --gpu rtx4090 --max-length 1024
tunemap advise --model models/llama --gpu h100 --gpus 8 --max-length 4096 --objective cost --study best.yaml
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.cells import cell_len
from rich.table import Table

from tunemap.errors import UserError, refuse_outside
from tunemap.files import write_atomic
from tunemap.inspect import plain_console
from tunemap.planner import cache
from tunemap.planner.advisor import MOST_ROWS, OBJECTIVES, Advice, advise, speed_words
from tunemap.planner.device import MOST_GB
from tunemap.planner.table import Ticker

DISPENSABLE = ("longest", "cost", "accuracy")  # columns that a narrow terminal goes without, the first first


def add_advise_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap advise`."""
    parser.add_argument("--model", required=True, help="folder with a config.json, or a name on the hub")
    parser.add_argument("--gpu", required=True, help="name of a file in resources/hardware, such as rtx4090")
    parser.add_argument("--gpus", type=int, default=1, help="how many of them (default: 1)")
    parser.add_argument("--max-length", type=int, required=True, help="longest sequence in tokens")
    parser.add_argument("--objective", choices=OBJECTIVES, default="throughput", help="default: throughput")
    parser.add_argument("--budget-gb", type=float, help="memory per GPU that may be used, in GB (default: all)")
    parser.add_argument("--study", type=Path, help="write a study file of the best three here")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--results", type=Path, default=cache.RESULTS, help="folder of results (default: results)")


def run_advise(arguments: argparse.Namespace) -> int:
    """Print the options, the best and why."""
    for name in ("gpus", "max_length"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: allowed are numbers above 0")
    if arguments.budget_gb is not None:
        refuse_outside("--budget-gb", arguments.budget_gb, MOST_GB)
    advice = advise(
        arguments.model,
        arguments.gpu,
        gpus=arguments.gpus,
        max_length=arguments.max_length,
        objective=arguments.objective,
        budget_bytes=round(arguments.budget_gb * 1e9) if arguments.budget_gb else None,
        results=arguments.results,
        progress=Ticker("advising"),
    )
    console = plain_console()
    if arguments.json:
        print(json.dumps(advice.to_dict(), indent=2))
    else:
        console.print(f"{arguments.model}, up to {arguments.max_length} tokens, on {arguments.gpus} × {arguments.gpu}")
        console.print(options_table(advice, console.width))
        console.print(advice.why)
    if arguments.study:  # last: what took minutes is on the screen even where this file cannot be written
        write_atomic(arguments.study, advice.study)
        if not arguments.json:
            said = f"Study file of the best {len(advice.best)}, on GSM8K until you name your data: {arguments.study}"
            console.print(said)
    return 0


def options_table(advice: Advice, width: int) -> Table:
    """One row per way to train: the best first, then what fits by speed, then what does not.

    No column is empty, and none is cut: those that `width` has no room for are left out, and the caption names them.
    """
    places = {one.name: place for place, one in enumerate(advice.best, 1)}
    last = len(places) + 1
    options = sorted(
        advice.options, key=lambda one: (not one.rows, places.get(one.name, last), -one.tokens_per_second_high)
    )
    columns = {
        "": [str(places.get(one.name, "")) for one in options],
        "way": [one.name for one in options],
        "rows": [str(one.rows) if one.rows else "none" for one in options],
        "GiB": [f"{one.peak_bytes / 2**30:.1f}" for one in options],
        "longest": [f"{one.longest:,}" if one.rows else "" for one in options],
        "tokens/s": [speed_words(one) if one.rows else "" for one in options],
        "cost": [_cost(one.cost_per_million_tokens if one.rows else None) for one in options],
        "accuracy": [
            f"{one.accuracy:+.1f} ({one.accuracy_runs})" if one.accuracy is not None else "" for one in options
        ],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    shown = _narrowed(filled, width)
    table = Table(caption=_caption(shown, [name for name in filled if name not in shown]), caption_justify="left")
    for name in shown:
        table.add_column(name, justify="left" if name in ("", "way") else "right", no_wrap=True)
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    return table


def _narrowed(columns: dict[str, list[str]], width: int) -> dict[str, list[str]]:
    """Without as many of the dispensable columns as it takes for the others to be whole."""
    for name in DISPENSABLE:
        needed = 1 + sum(3 + max(map(cell_len, (head, *cells))) for head, cells in columns.items())  # with borders
        if needed > width:
            columns = {head: cells for head, cells in columns.items() if head != name}
    return columns


def _cost(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _caption(shown: dict[str, list[str]], left_out: list[str]) -> str:
    said = {
        "rows": f"largest batch per GPU that fits, a power of two up to {MOST_ROWS}",
        "GiB": "what it takes, or one row would",
        "longest": "tokens of a single row that fit and have positions in the model",
        "cost": "of a million tokens, at most",
        "accuracy": "points to the best method of the same collected study (runs)",
    }
    lines = [f"{name}: {meaning}" for name, meaning in said.items() if name in shown]
    return "; ".join(lines + [f"a wider terminal shows {', '.join(left_out)}"] * bool(left_out))
