"""The training scenario of optimum-benchmark: python optimum_bench.py WORKLOAD_FOLDER RESULT_FILE.

It makes random data of the workload's shape by itself, so its losses say nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from optimum_benchmark import Benchmark, BenchmarkConfig, InlineConfig, PyTorchConfig, TrainingConfig
from transformers import AutoConfig, TrainerCallback
from workload import Stopwatch, Workload


def main() -> None:
    """Train."""
    folder, result = Path(sys.argv[1]), Path(sys.argv[2])
    work = Workload.load(folder)
    watch = Stopwatch(result, work)
    _carry(watch)
    adapter: dict[str, Any] = {}
    if work.method == "lora":
        settings = {"r": work.lora_rank, "lora_alpha": work.lora_alpha, "target_modules": "all-linear"}
        adapter = {"peft_type": "LORA", "peft_config": settings | {"task_type": "CAUSAL_LM"}}
    backend = PyTorchConfig(
        model=str(folder / "model"),
        task="text-generation",
        library="transformers",
        device=work.device,
        torch_dtype=work.dtype,
        inter_op_num_threads=1,
        intra_op_num_threads=work.threads,
        eval_mode=False,
        no_weights=False,
        **adapter,
    )
    scenario = TrainingConfig(
        max_steps=work.steps,
        warmup_steps=min(5, work.steps // 4),
        dataset_shapes={
            "dataset_size": work.steps * work.rows,
            "sequence_length": work.length,
            "vocab_size": AutoConfig.from_pretrained(folder / "model").vocab_size,
        },
        training_arguments={
            "per_device_train_batch_size": work.rows,
            "learning_rate": work.learning_rate,
            "lr_scheduler_type": "constant",
            "logging_steps": 10,
            "disable_tqdm": True,
        },
        latency=True,
    )
    report = Benchmark.launch(
        BenchmarkConfig(name="peers", launcher=InlineConfig(), backend=backend, scenario=scenario, print_report=False)
    )
    watch.save(losses=[], own_tokens_per_second=report.train.throughput.value * work.length)


def _carry(watch: Stopwatch) -> None:
    """Add the stopwatch to the callbacks of its Trainer."""
    from optimum_benchmark.backends.pytorch import backend

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.step_ended()

    class Timed(backend.Trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.add_callback(Clock())

    backend.Trainer = Timed


if __name__ == "__main__":
    main()
