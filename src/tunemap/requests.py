"""What the jobs of a run ask a scheduler for: cores, memory and time.

Sizes follow from the run, never from the site: from what `tunemap plan` predicts for it, and by rules of thumb where it
has not been asked. A repeated job asks for more memory and time, since those are what a repetition can help: `attempt`
counts from 1. Imports no torch.
"""

from __future__ import annotations

import math
from pathlib import Path

from tunemap.planner.prediction import Prediction
from tunemap.run import Run

PROCESS_BYTES = 3 << 30  # Python, torch and a CUDA context of one process
JOB_BYTES = 2 << 30  # three Snakemakes, the launcher and torchrun
# Copies of a model's file in host memory while it is loaded, one of them in twice as wide a dtype.
LOADING_COPIES = 3
# Training on a CPU besides: fp32 weights, gradients and two moments of weights that were stored in 16 bits.
TRAINING_COPIES = 8
UNKNOWN_MODEL_BYTES = 4 << 30  # before the model is prepared
SAFETY = 1.5  # a prediction is off by so much now and then; a limit that is too short costs more than one too long
LOAD_MINUTES = 20.0  # for all that is not training: loading, compiling, saving
UNKNOWN_TRAINING_MINUTES = 220.0  # where nothing is predicted
# What jobs take that are as short as evaluating a small model; as much as the profile gives where a rule says nothing.
SHORT_JOB_MINUTES = 120.0
UNKNOWN_TEST_ROWS = 2000
PASS_SECONDS = 0.1  # from token to token of a batch: some billions of parameters, 4 bits and an adapter on a GPU
CPU_FLOPS_PER_SECOND = 10e9  # of one core, in matrix products
STEP_DOWN_S = 120  # before its time limit a job is told to write a checkpoint


def gpus_per_node(run: Run) -> int:
    """Devices of one node; the plan makes sure that nodes are alike."""
    return run.factors.gpus // run.factors.nodes


def node_cpus(run: Run, *, device: str) -> int:
    """Cores of one node: those of the processes, and one per GPU for what runs beside them."""
    per_process = run.factors.threads_per_process + (0 if device == "cpu" else 1)
    return gpus_per_node(run) * per_process


def training_memory_mb(
    run: Run, *, device: str, model_bytes: int | None, predicted: Prediction | None, attempt: int
) -> int:
    """Host memory of one node in MB, doubled by each further attempt; never less than loading the model takes."""
    size = UNKNOWN_MODEL_BYTES if model_bytes is None else model_bytes
    training = TRAINING_COPIES * size if device == "cpu" else 0
    if predicted is not None and predicted.host_peak_bytes is not None:
        training = round(SAFETY * predicted.host_peak_bytes)
    process = PROCESS_BYTES + max(LOADING_COPIES * size, training)
    return _mb((JOB_BYTES + gpus_per_node(run) * process) * 2 ** (attempt - 1))


def evaluation_memory_mb(run: Run, *, model_bytes: int | None, attempt: int) -> int:
    """Host memory of an evaluation in MB, doubled by each further attempt."""
    process = PROCESS_BYTES + LOADING_COPIES * (UNKNOWN_MODEL_BYTES if model_bytes is None else model_bytes)
    return _mb((JOB_BYTES + gpus_per_node(run) * process) * 2 ** (attempt - 1))


def training_minutes(run: Run, *, predicted: Prediction | None, attempt: int) -> int:
    """Time limit of a training job: what is predicted × safety × attempt, at most what the run itself is limited to."""
    training = UNKNOWN_TRAINING_MINUTES
    if predicted is not None and predicted.seconds_high is not None:
        training = SAFETY * predicted.seconds_high / 60
    if run.factors.time_limit_minutes is not None:
        training = min(training, run.factors.time_limit_minutes)
    return math.ceil((training + LOAD_MINUTES) * attempt)


def evaluation_minutes(run: Run, *, device: str, model_bytes: int | None, attempt: int) -> int:
    """Time limit of an evaluation job: as if no answer ended before its limit, × safety × attempt."""
    factors = run.factors
    rows = math.ceil((run.dataset.test_rows or UNKNOWN_TEST_ROWS) / gpus_per_node(run))
    new_tokens = (factors.max_new_tokens or factors.max_length) if run.task_kind == "generation" else 1
    seconds = math.ceil(rows / factors.evaluation_batch_size) * new_tokens * PASS_SECONDS
    if device == "cpu" and model_bytes is not None:  # 2 FLOPs per weight and token, prompts too; 2 to 4 bytes a weight
        flops = rows * (factors.max_length + new_tokens) * model_bytes
        seconds += flops / (CPU_FLOPS_PER_SECOND * factors.threads_per_process)
    return math.ceil(max(SHORT_JOB_MINUTES, SAFETY * seconds / 60 + LOAD_MINUTES) * attempt)


def inference_minutes(*, attempt: int) -> int:
    """Time limit of measuring inference: some dozens of short calls for each of a few forms; × attempt."""
    return math.ceil(SHORT_JOB_MINUTES * attempt)


def prepared_bytes(folder: Path) -> int | None:
    """Size of a prepared model's weights in bytes; None before it is prepared."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return sum(sizes) if sizes else None


def _mb(count_bytes: int) -> int:
    return -(-count_bytes // 1_000_000)
