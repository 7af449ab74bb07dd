"""The Trainer of transformers: python hf_trainer.py WORKLOAD_FOLDER RESULT_FILE."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from workload import Stopwatch, Workload

COMMON: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 0,
}


class Rows(Dataset):  # type: ignore[type-arg]
    """The rows of all batches, in order."""

    def __init__(self, folder: Path) -> None:
        batches = np.load(folder / "batches.npz")
        self.ids, self.labels = (batches[name].reshape(-1, batches[name].shape[-1]) for name in ("input_ids", "labels"))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Clock(TrainerCallback):
    """Carries the stopwatch."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step ended."""
        self.watch.step_ended()


class InOrder(Trainer):
    """Everybody sees the same rows in the same order."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def model_of(folder: Path, work: Workload) -> Any:
    """The model, with an adapter on all linear layers where the method is LoRA."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, work.dtype)).to(work.device)
    if work.method == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(
            r=work.lora_rank, lora_alpha=work.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    return model


def settings_of(work: Workload, output: str) -> dict[str, Any]:
    """What the workload says, in the words of TrainingArguments."""
    return COMMON | {
        "output_dir": output,
        "use_cpu": work.device == "cpu",
        "per_device_train_batch_size": work.rows,
        "max_steps": work.steps,
        "learning_rate": work.learning_rate,
    }


def finish(watch: Stopwatch, work: Workload, metrics: dict[str, float]) -> None:
    """Save what was noted, with the mean loss and the throughput that the Trainer itself reports."""
    own = metrics["train_steps_per_second"] * work.tokens_per_step
    watch.save(losses=[metrics["train_loss"]], own_tokens_per_second=own)


def main() -> None:
    """Train."""
    folder, result = Path(sys.argv[1]), Path(sys.argv[2])
    work = Workload.load(folder)
    torch.set_num_threads(work.threads)
    watch = Stopwatch(result, work)
    with tempfile.TemporaryDirectory() as output:
        trainer = InOrder(
            model=model_of(folder, work),
            args=TrainingArguments(**settings_of(work, output)),
            train_dataset=Rows(folder),
            data_collator=default_data_collator,
            callbacks=[Clock(watch)],
        )
        finish(watch, work, trainer.train().metrics)


if __name__ == "__main__":
    main()
