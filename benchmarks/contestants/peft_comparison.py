"""The training loop of PEFT's method_comparison, from a checkout of its repository.

    PEFT_REPOSITORY=~/peft python peft_comparison.py WORKLOAD_FOLDER RESULT_FILE

The loop itself runs unchanged; its data, which it would download, are replaced by the workload's rows, and its
measurement of forgetting before and after training, which is not timed here, by a constant.
It trains on the prompt tokens too, so its losses differ a little from the others'.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft.utils
import torch
from hf_trainer import Rows, model_of
from transformers import AutoTokenizer
from workload import Stopwatch, Workload


class Batches:
    """The workload's batches, where the loop asks for its own."""

    def __init__(self, folder: Path, work: Workload) -> None:
        ids = Rows(folder).ids
        self.batches = [ids[i : i + work.rows].tolist() for i in range(0, len(ids), work.rows)]

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    def __iter__(self) -> Any:
        for batch in self.batches:
            yield {"input_ids": batch, "attention_mask": [[1] * len(row) for row in batch]}


def main() -> None:
    """Train."""
    folder, result = Path(sys.argv[1]), Path(sys.argv[2])
    work = Workload.load(folder)
    torch.set_num_threads(work.threads)
    watch = Stopwatch(result, work)
    batches = Batches(folder, work)
    repository = Path(os.environ["PEFT_REPOSITORY"])
    sys.path.insert(0, str(repository / "method_comparison" / "MetaMathQA"))
    peft.utils.infer_device = lambda: "cuda"  # it refuses a CPU; CUDA's memory counters say 0 where there is none
    comparison: Any = importlib.import_module("run")
    comparison.get_wiki_small = list
    comparison.calculate_mean_per_token_loss = lambda **_: 1.5
    comparison.get_train_valid_test_datasets = lambda **_: (batches, [], [])
    comparison.BucketIterator = lambda *_, **__: batches
    comparison.evaluate = lambda **_: ([""], [""])
    comparison.get_accuracy = lambda **_: 0.0
    comparison.print_verbose = print
    comparison.tqdm = lambda steps: _Bar(steps, watch)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trained = comparison.train(
        model=model_of(folder, work),
        max_steps=work.steps,
        batch_size=work.rows,
        batch_size_eval=1,
        tokenizer=tokenizer,
        accelerator_memory_init=0,
        eval_steps=work.steps,
        generation_kwargs={},
        grad_norm_clip=1.0,
        optimizer_type="AdamW",
        optimizer_kwargs={"lr": work.learning_rate, "weight_decay": 0.0},
        query_template="{query}",
        lr_scheduler_arg=None,
        use_amp=False,
        is_adalora=False,
        init_kv_cache_prefix=None,
        is_adamss=False,
    )
    if trained.error_msg:
        sys.exit(trained.error_msg)
    commit = {"PEFT's repository": _commit_of(repository)}
    watch.save(losses=trained.losses, own_tokens_per_second=trained.metrics[0]["tokens / sec"], **commit)


def _commit_of(repository: Path) -> str:
    if not (repository / ".git").exists():  # git would tell the commit of ours, in which its folder lies
        return "unknown"
    asked = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


class _Bar:
    """Stands in for the progress bar, whose update is the end of a step."""

    def __init__(self, steps: Any, watch: Stopwatch) -> None:
        self.steps, self.watch = steps, watch

    def __iter__(self) -> Any:
        return iter(self.steps)

    def set_postfix(self, values: dict[str, float]) -> None:
        """The loop shows the loss at the end of each step."""
        self.watch.step_ended()


if __name__ == "__main__":
    main()
