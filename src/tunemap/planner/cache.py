"""Accounts of steps, kept by the digest of what they depend on: a second dry run computes nothing.

    results/shared/plans/{digest}.json      an account, or the reason why there is none

Runs that differ in what memory and work do not depend on (seed, learning rate, steps, evaluation) share an account.
Imports no torch: `known_prediction` answers while the workflow is parsed.
"""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunemap import hardware
from tunemap.config import DataDriven, PeftMethod
from tunemap.errors import UserError
from tunemap.files import read_json, write_json
from tunemap.planner import cost, time
from tunemap.planner import device as devices
from tunemap.planner.data import data_of
from tunemap.planner.device import Target
from tunemap.planner.prediction import Account, Data, Prediction
from tunemap.run import Run, digest

RESULTS = Path("results")
PLANS = Path("shared") / "plans"  # below the folder of results
CEILINGS = Path("shared") / "ceilings.json"
VERSION = 5  # of the accounts: raise it when the same run is accounted for otherwise
STARTS_FROM_DATA = ("EVA", "LORA_GA", "CORDA")  # types of peft that run the model on training rows first
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
# Factors that neither memory nor work of a step depends on. max_length, batching and steps act through `Data`.
INDIFFERENT = {
    "learning_rate", "weight_decay", "schedule", "warmup_steps", "max_steps", "epochs", "seed", "threads_per_process",
    "measurement_warmup_steps", "logging_steps", "checkpoint_steps", "time_limit_minutes", "max_length", "batching",
    "evaluation_batch_size", "max_new_tokens", "per_device_batch_size", "max_grad_norm", "gradient_accumulation",
    "compile",
}  # fmt: skip


@dataclass(frozen=True)
class NoAccount:
    """Why a step could not be run without contents."""

    reason: str


def account_key(run: Run, data: Data, *, on_gpu: bool) -> str:
    """Digest of everything that the account of a run depends on."""
    spec = run.training_spec()
    factors = {name: value for name, value in spec["factors"].items() if name not in INDIFFERENT}
    return digest(
        {
            "version": [VERSION, *_versions()],
            "model": spec["model"],
            "method": spec["method"],
            "factors": factors,
            "clipped": run.factors.max_grad_norm is not None,
            "gradient_accumulation": run.factors.gradient_accumulation,
            "batch": asdict(data.batch),
            "num_labels": data.num_labels,
            "task_kind": run.task_kind,
            "on_gpu": on_gpu,
        }
    )


@functools.cache
def _versions() -> tuple[str, ...]:
    return tuple(importlib.metadata.version(name) for name in LIBRARIES)


def read_account(key: str, results: Path = RESULTS) -> Account | NoAccount | None:
    """What is kept under a key; None where nothing is, or something unreadable."""
    path = results / PLANS / f"{key}.json"
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        return NoAccount(values["reason"]) if "reason" in values else Account.from_dict(values)
    except (UserError, KeyError, TypeError):
        return None


def write_account(key: str, account: Account | NoAccount, results: Path = RESULTS) -> None:
    """Keep an account under its key."""
    values = asdict(account) if isinstance(account, NoAccount) else account.to_dict()
    write_json(results / PLANS / f"{key}.json", values)


def known_prediction(
    run: Run, *, device: str = "auto", description: str | None = None, results: Path = RESULTS
) -> Prediction | None:
    """The prediction of a run, if its step has been accounted for before; None else, and for runs without training.

    device, description: `hardware` of the study. `host_peak_bytes` and `device_peak_bytes` are those of one process.
    """
    if run.is_base:
        return None
    target, data = target_of(device, description), data_of(run, results)
    found = read_account(account_key(run, data, on_gpu=target.on_gpu), results)
    return predict(run, found, data, target, results=results) if isinstance(found, Account) else None


@functools.cache
def target_of(device_kind: str, description: str | None) -> Target:
    """The device that a study runs on: the GPU that it describes, else the first one here, else this machine's CPU."""
    machine = hardware.this_machine()
    if device_kind == "cpu" or (device_kind == "auto" and description is None and not machine.gpus):
        return Target.cpu(machine)
    if description is not None:
        described = hardware.load_hardware(description)
        return Target.gpu(described) if described.kind == "gpu" else Target.cpu(machine)
    found = hardware.hardware_of_device(machine.gpus[0]) if machine.gpus else None
    name = machine.gpus[0] if machine.gpus else "an unknown GPU"
    return Target.gpu(found) if found else Target(name, True, None, None)


def predict(
    run: Run, account: Account | NoAccount, data: Data, target: Target, *, results: Path = RESULTS
) -> Prediction:
    """What a run comes to on a device, from the account of its step."""
    if isinstance(account, NoAccount):
        return Prediction(run.id, target.name, reason=account.reason, memory_bytes=target.memory_bytes)
    factors = run.factors
    parts = devices.device_bytes(account, target, devices=factors.gpus)
    needed = sum(parts.values())
    host = devices.host_bytes(account, target)
    decisive = devices.needed_bytes(account, target, devices=factors.gpus)
    verdict, reason = devices.verdict(decisive, target, processes=factors.gpus)
    narrower = min(1.0, data.mean_width / account.batch.width)
    flops = time.at_width(account.work, narrower).flops + account.optimizer.flops
    return Prediction(
        run=run.id,
        device=target.name,
        peak_bytes=account.peak_bytes,
        breakdown_bytes=account.breakdown_bytes,
        phase_peak_bytes=account.phase_peak_bytes,
        device_breakdown_bytes=parts,
        device_peak_bytes=needed,
        host_peak_bytes=host,
        memory_bytes=target.memory_bytes,
        estimation_peak_bytes=account.estimation_peak_bytes,
        flops_per_step=flops * factors.gpus,
        communication_bytes_per_step=account.communication_bytes,
        communication_sent_bytes_per_step=account.sent_bytes,
        steps=data.steps,
        tokens_per_step=data.tokens_per_step,
        verdict=verdict,
        reason=reason,
        notes=account.notes,
        **_times(run, account, data, target, results),
    )


def _times(run: Run, account: Account, data: Data, target: Target, results: Path) -> dict[str, Any]:
    """Seconds, energy and money, as far as they are known."""
    factors = run.factors
    step = time.step_seconds(
        account, data, target, threads=factors.threads_per_process, ceilings=measured_ceilings(results, target)
    )
    if step is None:
        return {}
    found: dict[str, Any] = {"step_seconds_low": step[0], "step_seconds_high": step[1]}
    if data.steps is None:
        return found
    pieces = factors.gradient_accumulation
    micro_batch = step[0] / pieces, step[1] / pieces
    start = time.start_seconds(account, micro_batch, _estimation_batches(run, account))
    seconds = (start[0] + data.steps * step[0], start[1] + data.steps * step[1])
    found |= {"seconds_low": seconds[0], "seconds_high": seconds[1]}
    return found | asdict(cost.costs(seconds, target.hardware, devices=factors.gpus))


def _estimation_batches(run: Run, account: Account) -> int:
    """Batches of one device that the method looks at before it starts."""
    method = run.method
    by_type = isinstance(method, PeftMethod) and method.type in STARTS_FROM_DATA
    if not isinstance(method, DataDriven) or not (by_type or account.estimation_peak_bytes is not None):
        return 0
    return -(-method.estimation_batches // run.factors.gpus)


def measured_ceilings(results: Path, target: Target) -> dict[str, float]:
    """Matmul FLOP/s by dtype, where `tunemap ceiling` has measured one device of the target's kind; empty else."""
    path = results / CEILINGS
    stored = read_json(path).values() if path.is_file() else ()
    found = [entry["ceilings"] for entry in stored if _is_of(entry.get("device"), target)]
    return {dtype: entry["flops_per_s"] for dtype, entry in found[0].items()} if len(found) == 1 else {}


def _is_of(device: str | None, target: Target) -> bool:
    """Whether a device, by the driver's name or `cpu`, is what is planned for."""
    return device == target.name or (target.hardware is not None and device in target.hardware.device_names)
