"""How fast rows become token ids, and how that grows with the rows, beside the obvious alternative.

    python benchmarks/tokenisation.py                 # 1,000, 10,000 and 100,000 rows; prints a table
    python benchmarks/tokenisation.py --output benchmarks/results/tokenisation-cpu.json

Ours is the stage of the workflow: read the prepared rows, check their checksum, tokenise, count lengths, truncation and
padding, write arrays and their seal. The alternative is what most training scripts do: `datasets.load_dataset` of the
same file and a batched `map` that joins prompt, answer and end of sequence. Both must find the same ids. Each
measurement is a process of its own, in turn, with one thread; its imports are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
SIZES = (1_000, 10_000, 100_000)
MAX_LENGTH = 512
NO_BARS = "HF_DATASETS_DISABLE_PROGRESS_BARS"


def prepare(folder: Path, rows: int) -> None:
    """Rows of arithmetic told in words, a tokenizer."""
    from tunemap import corpora
    from tunemap.config import DatasetConfig
    from tunemap.data import sources

    draw = np.random.default_rng(0)
    for split, count in (("train", rows), ("test", 10)):
        terms = draw.integers(0, 10, (count, 20)).tolist()
        lines = (
            json.dumps({"prompt": f"{split} {index} " + " plus ".join(map(str, row)), "answer": f"#### {sum(row)}"})
            for index, row in enumerate(terms)
        )
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    fields = {"prompt_field": "prompt", "answer_field": "answer"}
    files = {"train_file": "train.jsonl", "test_file": "test.jsonl"}
    dataset = DatasetConfig.model_validate({"task": "generation", "source": "file", **files, **fields})
    sources.prepare(dataset, folder / "dataset", data_root=folder)
    corpora.build_arithmetic_tokenizer().save_pretrained(folder / "tokenizer")


def tokenise_ours(folder: Path) -> None:
    """The workflow's stage."""
    from tunemap.data import tokens

    tokens.tokenize(
        folder / "dataset",
        folder / "tokenizer",
        folder / "tokens",
        max_length=MAX_LENGTH,
        prompt_template="{prompt}",
        system_prompt=None,
    )


def tokenise_with_datasets(folder: Path) -> None:
    """`datasets` and a batched map."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    loaded = datasets.load_dataset(
        "json", data_files=str(folder / "dataset" / "train.jsonl"), split="train", cache_dir=str(folder / "cache")
    )

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = tokenizer(batch["prompt"], add_special_tokens=False)["input_ids"]
        answers = tokenizer(batch["answer"], add_special_tokens=False)["input_ids"]
        joined = zip(prompts, answers, strict=True)
        return {"input_ids": [[*a, *b, tokenizer.eos_token_id][:MAX_LENGTH] for a, b in joined]}

    mapped = loaded.map(encode, batched=True, remove_columns=loaded.column_names)
    mapped.save_to_disk(str(folder / "mapped"))


WAYS = {"tunemap": tokenise_ours, "datasets": tokenise_with_datasets}
MADE = {"tunemap": ("tokens",), "datasets": ("mapped", "cache")}  # folders


def measure(way: str, folder: Path) -> dict[str, float]:
    """Seconds of one way, in this process."""
    import datasets
    import transformers

    from tunemap.data import tokens

    assert all((datasets, transformers, tokens))  # imports are not what is compared
    began, used = time.perf_counter(), time.process_time()
    WAYS[way](folder)
    seconds, processor_s = time.perf_counter() - began, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"wall_s": seconds, "processor_s": processor_s, "peak_bytes": peak}


def same_ids(folder: Path) -> int:
    """The tokens that both ways found; raises if they differ."""
    import datasets

    from tunemap.data import tokens

    ours = tokens.load_tokens(folder / "tokens").train
    theirs = datasets.load_from_disk(str(folder / "mapped"))["input_ids"]
    joined = np.concatenate([np.asarray(row) for row in theirs])
    assert np.array_equal(ours.input_ids, joined), "the two ways found different ids"
    return len(joined)


def compare(rows: int, rounds: int) -> dict[str, Any]:
    """Both ways on `rows` rows, in turn."""
    from tunemap.statistics import mean

    environment = os.environ | dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", NO_BARS), "1")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), rows)
        for turn in range(rounds):
            for way in list(WAYS)[:: 1 if turn % 2 == 0 else -1]:
                for made in MADE[way]:
                    shutil.rmtree(Path(name) / made, ignore_errors=True)
                answer = subprocess.run(
                    [sys.executable, __file__, "--measure", way, name],
                    env=environment,
                    check=True,
                    stdout=-1,
                    text=True,
                )
                found[way].append(json.loads(answer.stdout.splitlines()[-1]))
        tokens = same_ids(Path(name))
    logarithms = [
        math.log(b["processor_s"] / a["processor_s"]) for a, b in zip(found["tunemap"], found["datasets"], strict=True)
    ]
    ratio = {key: math.exp(value) for key, value in asdict(mean(logarithms)).items()}
    middle = {
        way: {key: float(np.median([one[key] for one in runs])) for key in runs[0]} for way, runs in found.items()
    }
    return {"rows": rows, "tokens": tokens, **middle, "speed_up": ratio}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(SIZES), help="sizes of the dataset")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the results there, with the machine they are from")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, folder = arguments.measure
        print(json.dumps(measure(way, Path(folder))))
        return
    sizes = []
    ours, theirs = f"{'tokens/s':>10} {'peak MB':>8}", f"{'datasets tokens/s':>18} {'peak MB':>8}"
    print(f"{'rows':>8} {ours} {theirs}  its processor time / ours")
    for rows in arguments.rows:
        sizes.append(found := compare(rows, arguments.rounds))
        ours, theirs = found["tunemap"], found["datasets"]
        print(
            f"{rows:8} {found['tokens'] / ours['processor_s']:10.0f} {ours['peak_bytes'] / 1e6:8.0f}"
            f" {found['tokens'] / theirs['processor_s']:18.0f} {theirs['peak_bytes'] / 1e6:8.0f}"
            f"  {found['speed_up']['estimate']:.2f} [{found['speed_up']['low']:.2f}, {found['speed_up']['high']:.2f}]",
            flush=True,
        )
    if arguments.output:
        from tunemap.files import write_json
        from tunemap.measure.environment import environment

        write_json(arguments.output, {"sizes": sizes, "environment": environment(REPOSITORY).as_dict()})


if __name__ == "__main__":
    main()
