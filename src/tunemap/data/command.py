"""`tunemap data-stats`: what a tokenizer, a template and a maximum length do to a dataset, before anything is trained.

tunemap data-stats --task gsm8k --path data/gsm8k --tokenizer models/qwen --max-length 512 --json
tunemap data-stats --task classification --path reviews.csv --prompt-field text --answer-field stars ...
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from tunemap.config import DatasetConfig
from tunemap.data.batches import Batching
from tunemap.data.tasks import TASKS
from tunemap.errors import UserError


def add_data_stats_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `tunemap data-stats`."""
    parser.add_argument("--task", required=True, choices=list(TASKS), help="what is learned")
    parser.add_argument("--path", required=True, type=Path, help="a jsonl, csv or tsv file, or a folder with splits")
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder of the tokenizer")
    parser.add_argument("--max-length", required=True, type=_positive, help="longest sequence in tokens")
    parser.add_argument("--template", help="file or text with {prompt}; without it the tokenizer's chat template")
    parser.add_argument("--system-prompt", help="system message of the chat template")
    parser.add_argument("--subset", help="configuration of a folder in the hub's layout, such as main")
    parser.add_argument("--prompt-field", help="column of the prompt or text")
    parser.add_argument("--answer-field", help="column of the answer or label")
    parser.add_argument("--batching", choices=get_args(Batching), default="longest", help="default: %(default)s")
    parser.add_argument("--per-device-batch-size", type=_positive, default=8, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run_data_stats(args: argparse.Namespace) -> int:
    """Print the statistics and what the label gates say about them; returns 0 however they end."""
    statistics = data_statistics(args)
    if args.json:
        print(json.dumps(statistics, indent=1))
    else:
        _print_table(statistics)
    return 0


def data_statistics(args: argparse.Namespace) -> dict[str, Any]:
    """The statistics of every row of a file (as training rows), or of a folder's splits, with key `gates`."""
    from tunemap.data.sources import RawData, labels_of, read_records, read_source, rows_of
    from tunemap.data.statistics import dataset_statistics
    from tunemap.data.tokenizers import load_tokenizer, resolve_tokenizer
    from tunemap.data.tokens import encode_answers, encode_prompts, encode_texts
    from tunemap.gates import label_gates

    path: Path = args.path
    dataset = DatasetConfig(
        task=args.task,
        source="local",
        path=str(path),
        subset=args.subset,
        prompt_field=args.prompt_field,
        answer_field=args.answer_field,
    )
    if path.is_dir():
        raw = read_source(dataset, None)
    elif path.is_file():
        raw = RawData(read_records(path), [], "test")
    else:
        raise UserError(f"--path {path}: no such file or folder")
    labels = labels_of(dataset, raw)
    train_rows = rows_of(dataset, "train", raw.train, labels)
    test_rows = rows_of(dataset, raw.test_split, raw.test, labels)
    options = {"prompt_template": template_text(args.template), "system_prompt": args.system_prompt}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(resolve_tokenizer(args.tokenizer, Path(scratch)))
    if labels.names:
        train, test = (encode_texts(rows, tokenizer, args.max_length, **options) for rows in (train_rows, test_rows))
    else:
        train = encode_answers(train_rows, tokenizer, args.max_length, **options)
        test = encode_prompts(test_rows, tokenizer, **options)
    statistics = dataset_statistics(
        train,
        test if test_rows else None,
        max_length=args.max_length,
        batching=args.batching,
        per_device_batch_size=args.per_device_batch_size,
    )
    gates = label_gates(statistics, accept_truncation=False)
    return statistics | {"gates": [asdict(gate) for gate in gates]}


def template_text(template: str | None) -> str | None:
    """The text of a template that is given as a file's name or as the text itself."""
    if template is None or "{prompt}" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise UserError(f"--template {template!r}: neither a file nor a text with {{prompt}}")
    return path.read_text(encoding="utf-8")


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number above 0")
    return value


def _print_table(statistics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    numbers = Table("statistic", "value", title="training rows")
    lengths = Table("length", "min", "p25", "median", "mean", "p75", "p95", "p99", "max")
    for name, value in statistics.items():
        if isinstance(value, dict) and "median" in value:
            lengths.add_row(
                name.removesuffix("_tokens"), *(f"{value[column.header]:.1f}" for column in lengths.columns[1:])
            )
        elif isinstance(value, int | str) or value is None:
            numbers.add_row(name, "-" if value is None else str(value))
        elif isinstance(value, float):
            numbers.add_row(name, f"{value:.2%}")
    console = Console()
    console.print(lengths, numbers)
    for gate in statistics["gates"]:
        verdict = "passed" if gate["passed"] else "FAILED"
        console.print(f"{verdict}  {gate['gate']}: {gate['message']}", highlight=False, soft_wrap=True)
