"""One process of a training run; the launcher starts as many of these as the run has devices.

    python -m tunemap.training.worker --run-file spec.json --model DIR --tokens DIR --work DIR --weights DIR --device cpu

Leaves in the work folder: steps.rankN.csv while training, result.json at the end (rank 0), or failure.rankN.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import contextmanager
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunemap.files import read_json, write_json
from tunemap.gates import GateResult
from tunemap.measure.clock import PartsTimer
from tunemap.run import Run
from tunemap.training.failure import InvalidRunError, describe, write_failure

if TYPE_CHECKING:  # torch takes seconds to import, and a broken one must still end in an outcome
    import torch
    from torch import nn

    from tunemap.data.batches import Schedule
    from tunemap.data.tokens import Tokens
    from tunemap.distributed.world import World
    from tunemap.training.loop import TrainingState

RESULT, PROGRESS = "result.json", "progress.json"
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """What the launcher hands to each worker."""

    run: Run
    model: Path
    dataset: Path
    tokens: Path
    work: Path
    weights: Path
    device: str


def main() -> None:
    """Train as one rank; the exit code is 0 only if this rank finished."""
    job = _parse(sys.argv[1:])
    rank = int(os.environ.get("RANK", 0))
    progress = Progress(job.work, is_main=rank == 0)
    try:
        _train(job, progress)
    except Exception as error:
        write_failure(job.work, describe(error, rank=rank, phase=progress.phase, step=progress.step))
        raise SystemExit(1) from error
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # everything is on disk; tearing the interpreter down would cost most of a second


class Progress:
    """Where a run is, for its log, for `failure.rankN.json` and for whoever looks at progress.json."""

    def __init__(self, work: Path, *, is_main: bool) -> None:
        self._work, self._is_main = work, is_main
        self.phase: str | None = None
        self.step: int | None = None
        self.gates: list[GateResult] = []

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name the phase of the body."""
        self.phase = phase
        self._write()
        yield

    def window(self, step: int, steps: int, loss: float, elapsed_s: float, first_step: int) -> None:
        """One line per logging window, with the time that is left."""
        self.step = step
        self._write(steps=steps, loss=loss)
        if self._is_main:
            left_s = elapsed_s / max(1, step) * (steps - step)
            print(f"step {step}/{steps}  loss {loss:.4f}  {elapsed_s:.1f} s, {left_s:.0f} s left", flush=True)

    def check(self, results: list[GateResult]) -> None:
        """Keep the results of gates; a fatal one that did not pass ends the run."""
        self.gates += results
        self._write()
        tripped = [result for result in results if result.fatal and not result.passed]
        if tripped:
            raise InvalidRunError("; ".join(f"gate {result.gate}: {result.message}" for result in tripped))

    def _write(self, **details: Any) -> None:
        if self._is_main:
            gates = [asdict(gate) for gate in self.gates]
            write_json(self._work / PROGRESS, {"phase": self.phase, "step": self.step, "gates": gates, **details})


def _parse(arguments: list[str]) -> Job:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-file", type=Path, required=True)
    for name in ("model", "dataset", "tokens", "work", "weights"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    values = vars(parser.parse_args(arguments))
    run = Run.from_json(values.pop("run_file").read_text())
    return Job(run=run, **values)


def _train(job: Job, progress: Progress) -> None:
    run, factors = job.run, job.run.factors
    parts = PartsTimer(since_process_start=True)
    with progress.during("load"), parts.part("load"):
        import torch

        torch.set_num_threads(factors.threads_per_process)
        from tunemap.data.batches import batch_schedule
        from tunemap.data.tokens import load_tokens
        from tunemap.distributed.world import join_world, leave_world
        from tunemap.training import checkpoint
        from tunemap.training.assemble import assemble

        world = join_world(job.device, strategy=factors.strategy)
    with progress.during("data"), parts.part("load"):
        tokens = load_tokens(job.tokens)
        progress.check(_data_gates(job, tokens))
        schedule = batch_schedule(
            tokens.train.lengths,
            per_device_batch_size=factors.per_device_batch_size,
            gradient_accumulation=factors.gradient_accumulation,
            world_size=world.size,
            batching=factors.batching,
            max_length=factors.max_length,
            seed=factors.seed,
            epochs=factors.epochs,
            max_steps=factors.max_steps,
        )
    with progress.during("load"), parts.part("load"):
        assembled = assemble(run, job.model, world, num_labels=len(tokens.label_names) or None)
        state = assembled.state
        checkpoint.seed_everything(factors.seed, world.rank)
        found = checkpoint.find(
            job.work, digest=run.training_digest, strategy=factors.strategy, world_size=world.size
        )
        if found.manifest is not None:
            checkpoint.restore(job.work, state, world, found.manifest)
        if world.is_main:
            print(found.message, flush=True)
    with progress.during("train"), parts.part("training"):
        _run_loop(job, progress, parts, world, tokens, schedule, assembled.precision, state)
    with progress.during("save"), parts.part("checkpoint"):
        from tunemap.training.weights import save_weights

        save_weights(state.model, run, job.model, job.weights, world)
    records = world.gather(_rank_result(world, state))
    if world.is_main:
        write_json(
            job.work / RESULT,
            {
                "parts_s": parts.seconds(),
                "memory": records,
                "parameters": asdict(assembled.parameters),
                "facts": assembled.facts,
                "data_order_hash": schedule.order_hash,
                "steps_planned": schedule.steps,
                "gates": [asdict(gate) for gate in progress.gates],
                "environment": _environment(world),
            },
        )
    world.barrier()
    leave_world()


def _run_loop(
    job: Job,
    progress: Progress,
    parts: PartsTimer,
    world: World,
    tokens: Tokens,
    schedule: Schedule,
    precision: Any,
    state: TrainingState,
) -> None:
    from tunemap.measure.memory import reset_peaks
    from tunemap.training import checkpoint, steps
    from tunemap.training.batches import feed, micro_batches
    from tunemap.training.loop import Loop, NotFiniteError

    factors, first_step = job.run.factors, state.step
    own_file = steps.rank_file(job.work, world.rank)
    steps.keep_until(own_file, first_step)
    saved_at = time.monotonic()

    def window_ended(state: TrainingState, loss: float) -> None:
        nonlocal saved_at
        progress.window(state.step, schedule.steps, loss, state.elapsed_s, first_step)
        every = factors.checkpoint_steps
        window = factors.logging_steps
        due = state.step // every > (state.step - window) // every if every else time.monotonic() - saved_at > CHECKPOINT_SECONDS
        if state.step < schedule.steps and world.sum(float(due)) > 0:
            with parts.part("checkpoint"):
                checkpoint.save(
                    job.work, state, world, digest=job.run.training_digest, strategy=factors.strategy
                )
            saved_at = time.monotonic()

    loop = Loop(
        factors=factors,
        precision=precision,
        schedule=schedule,
        world=world,
        label_tokens=schedule.per_step(tokens.train.label_tokens).tolist(),
        write=lambda records: steps.append_records(own_file, records),
        window_ended=window_ended,
    )
    reset_peaks(world.device)
    batches = micro_batches(tokens, schedule, world, first_step=first_step, attention=factors.attention)
    try:
        loop.train(state, feed(batches, world.device))
    except NotFiniteError as error:
        progress.check([GateResult("finite_loss", False, True, str(error))])
    progress.check([GateResult("finite_loss", True, True, "every loss is a finite number")])


def _data_gates(job: Job, tokens: Tokens) -> list[GateResult]:
    from tunemap.gates import disjoint_gate, label_gates

    results = [disjoint_gate(read_json(job.dataset / "dataset.json"), tokens.statistics)]
    if tokens.task_kind == "generation":
        results += label_gates(tokens.statistics, accept_truncation=job.run.dataset.accept_truncation)
    return results


def _rank_result(world: World, state: TrainingState) -> dict[str, Any]:
    from tunemap.measure.memory import memory_record

    record = asdict(memory_record(world.device))
    tracked = {name: value for name, value in (state.memory or {}).items() if name != "peak_phase"}
    return {"rank": world.rank, **record, **tracked}


def _environment(world: World) -> dict[str, Any]:
    import torch

    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(world.device)}


if __name__ == "__main__":
    main()
