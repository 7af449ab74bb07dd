"""What the jobs of a run ask a scheduler for: devices, cores, memory and time.

Sizes follow from the run, never from the site. A repeated job asks for more memory and time, since those are what a
repetition can help: `attempt` counts from 1.
"""

from __future__ import annotations

from pathlib import Path

from tunemap.run import Run

PROCESS_BYTES = 3 << 30  # Python, torch and a CUDA context of one process
JOB_BYTES = 2 << 30  # three Snakemakes, the launcher and torchrun
# Copies of a model's file in host memory while it is loaded, one of them in twice as wide a dtype.
LOADING_COPIES = 3
# Training on a CPU besides: fp32 weights, gradients and two moments of weights that were stored in 16 bits.
TRAINING_COPIES = 8
UNKNOWN_MODEL_BYTES = 4 << 30  # before the model is prepared
SAFETY = 1.5
LOAD_MINUTES = 20.0  # for all that is not training: loading, compiling, saving
UNKNOWN_TRAINING_MINUTES = 220.0
STEP_DOWN_S = 120  # before its time limit a job is told to write a checkpoint


def gpus_per_node(run: Run) -> int:
    """Devices of one node; the plan makes sure that nodes are alike."""
    return run.factors.gpus // run.factors.nodes


def node_cpus(run: Run, *, device: str) -> int:
    """Cores of one node: those of the processes, and one per GPU for what runs beside them."""
    per_process = run.factors.threads_per_process + (0 if device == "cpu" else 1)
    return gpus_per_node(run) * per_process


def training_memory_mb(run: Run, *, device: str, model_bytes: int | None, attempt: int) -> int:
    """Host memory of one node in MB, doubled by each further attempt."""
    copies = LOADING_COPIES + (TRAINING_COPIES if device == "cpu" else 0)
    process = PROCESS_BYTES + copies * (UNKNOWN_MODEL_BYTES if model_bytes is None else model_bytes)
    return _mb((JOB_BYTES + gpus_per_node(run) * process) * 2 ** (attempt - 1))


def evaluation_memory_mb(*, model_bytes: int | None, attempt: int) -> int:
    """Host memory of an evaluation in MB, doubled by each further attempt."""
    size = UNKNOWN_MODEL_BYTES if model_bytes is None else model_bytes
    return _mb((JOB_BYTES + PROCESS_BYTES + LOADING_COPIES * size) * 2 ** (attempt - 1))


def training_minutes(run: Run, *, attempt: int) -> int:
    """Time limit of a training job: what is predicted × safety × attempt; a limit of the run itself comes first."""
    limit = run.factors.time_limit_minutes
    training = UNKNOWN_TRAINING_MINUTES if limit is None else limit
    return round((training + LOAD_MINUTES) * (1.0 if limit is not None else SAFETY) * attempt)


def prepared_bytes(folder: Path) -> int | None:
    """Size of a prepared model's weights in bytes; None before it is prepared."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return sum(sizes) if sizes else None


def _mb(count_bytes: int) -> int:
    return -(-count_bytes // 1_000_000)
