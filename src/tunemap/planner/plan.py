"""Predictions for all runs of a study: accounts that are missing are made once, and kept.

Imports torch only where an account is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import read_json, write_json
from tunemap.frozen import FrozenPlan
from tunemap.hardware import Hardware, known_hardware, load_hardware
from tunemap.planner import cache
from tunemap.planner.cache import NoAccount, account_key, predict, read_account, target_of, write_account
from tunemap.planner.data import data_of
from tunemap.planner.device import Target
from tunemap.planner.prediction import ON_GPUS, Account, Data, Prediction
from tunemap.run import Run
from tunemap.startup import quick_imports

SHOWN_ON_GPUS = (
    "device", "memory_bytes", "device_peak_bytes", "verdict", "step_seconds_low", "step_seconds_high",
    "tokens_per_step", "cost_low", "cost_high", "currency",
)  # fmt: skip
A_GPU = Target("a GPU", on_gpu=True, memory_bytes=None, hardware=None)
Progress = Callable[[int, int], None]
"""Called before each account that is made, with how many are made and how many are to be."""


def predictions(
    runs: Iterable[Run],
    *,
    device: str = "auto",
    description: str | None = None,
    data_root: Path = Path(),
    results: Path = cache.RESULTS,
    progress: Progress = lambda done, total: None,
) -> dict[str, Prediction]:
    """Run id -> prediction, for every run that trains."""
    return predictions_for(
        runs, target_of(device, description), data_root=data_root, results=results, progress=progress
    )


def predictions_for(
    runs: Iterable[Run],
    target: Target,
    *,
    data_root: Path = Path(),
    results: Path = cache.RESULTS,
    progress: Progress = lambda done, total: None,
) -> dict[str, Prediction]:
    """The same for one device."""
    return {
        run.id: predict(run, found, data, target, results=results)
        for run, found, data in accounts_of(runs, target, data_root=data_root, results=results, progress=progress)
    }


def accounts_of(
    runs: Iterable[Run], target: Target, *, data_root: Path, results: Path, progress: Progress
) -> list[tuple[Run, Account | NoAccount, Data]]:
    """The account of each run that trains, and its data; missing accounts are made and kept."""
    trained = [run for run in runs if not run.is_base]
    data = {run.id: data_of(run, results) for run in trained}
    keys = {run.id: account_key(run, data[run.id], on_gpu=target.on_gpu) for run in trained}
    accounts = {key: read_account(key, results) for key in dict.fromkeys(keys.values())}
    missing = {keys[run.id]: run for run in reversed(trained) if accounts[keys[run.id]] is None}
    for done, (key, run) in enumerate(missing.items()):
        progress(done, len(missing))
        accounts[key] = make_account(run, data[run.id], target, data_root=data_root, results=results)
        write_account(key, accounts[key], results)  # type: ignore[arg-type]
    if missing:
        progress(len(missing), len(missing))
    return [(run, accounts[keys[run.id]], data[run.id]) for run in trained]  # type: ignore[misc]


def predict_to_file(plan_path: Path, data_root: Path, output: Path, *, results: Path, progress: Progress) -> None:
    """Predict every run of a frozen plan, on its own device and on every described GPU, and write what was found."""
    plan = FrozenPlan(str(plan_path), str(plan_path), read_json(plan_path))
    hardware = plan.values["hardware"]
    target = target_of(hardware["device"], hardware["description"])
    folders = {"data_root": data_root, "results": results}
    found = accounts_of(plan.runs.values(), target, **folders, progress=progress)
    # A step is not the same there: under a mask in place of by document, with dropout kept in another way.
    there = found if target.on_gpu else accounts_of(plan.runs.values(), A_GPU, **folders, progress=progress)
    gpus = described_gpus()
    write_json(
        output,
        {
            run.id: predict(run, account, data, target, results=results).to_dict()
            | {ON_GPUS: on_gpus(run, of_gpu, data, gpus, results=results)}
            for (run, account, data), (_, of_gpu, _) in zip(found, there, strict=True)
        },
    )


def described_gpus() -> list[Hardware]:
    """Every GPU that resources/hardware describes, by memory."""
    found = [load_hardware(name) for name in known_hardware()]
    return sorted((one for one in found if one.kind == "gpu"), key=lambda one: (one.memory_bytes or 0, one.name))


def on_gpus(
    run: Run, account: Account | NoAccount, data: Data, gpus: Iterable[Hardware], *, results: Path
) -> list[dict[str, Any]]:
    """What a run comes to on each of these GPUs; empty where its step cannot be accounted for."""
    if isinstance(account, NoAccount):
        return []
    found = [predict(run, account, data, Target.gpu(one), results=results) for one in gpus]
    return [{name: getattr(one, name) for name in SHOWN_ON_GPUS} for one in found]


def make_account(run: Run, data: Data, target: Target, *, data_root: Path, results: Path) -> Account | NoAccount:
    """The account of a run, or the reason why its step cannot be run without contents."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # kernels that no plan computes with
    with quick_imports():
        import torch

        from tunemap.planner.memory import account
        from tunemap.planner.models import architecture_of

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing is computed
    try:
        config = architecture_of(run.model, results / "shared" / "models" / run.model_key, data_root)
        return account(run, config, data.batch, num_labels=data.num_labels, on_gpu=target.on_gpu)
    except UserError as error:
        return NoAccount(str(error))
    except Exception as error:  # whatever a method's code does with contents that are not there
        where = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return NoAccount(f"{run.method_name} cannot be run without contents ({where})")
    finally:
        torch.set_num_threads(threads)
