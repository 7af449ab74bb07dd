"""SFTTrainer of TRL: python trl_sft.py WORKLOAD_FOLDER RESULT_FILE."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hf_trainer import Clock, Rows, finish, model_of, settings_of
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from workload import Stopwatch, Workload


class InOrder(SFTTrainer):  # type: ignore[misc]
    """Everybody sees the same rows in the same order."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def main() -> None:
    """Train on the tokenised rows."""
    folder, result = Path(sys.argv[1]), Path(sys.argv[2])
    work = Workload.load(folder)
    torch.set_num_threads(work.threads)
    rows = Rows(folder)
    columns = {"input_ids": rows.ids.tolist(), "labels": rows.labels.tolist()}
    watch = Stopwatch(result, work)
    with tempfile.TemporaryDirectory() as output:
        plain = {"max_length": work.length, "gradient_checkpointing": False, "bf16": False}
        trainer = InOrder(
            model=model_of(folder, work),
            args=SFTConfig(**settings_of(work, output) | plain),
            train_dataset=Dataset.from_dict(columns),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[Clock(watch)],
        )
        finish(watch, work, trainer.train().metrics)


if __name__ == "__main__":
    main()
