"""One process of a training run; the launcher starts as many of these as the run has devices.

    python -m tunemap.training.worker --run-file spec.json --model DIR --dataset DIR --tokens DIR
        --work DIR --weights DIR --device cpu --checkpoint-identity DIGEST

Leaves in the work folder: environment.json, steps.rankN.csv while training, result.json at the end (rank 0), or
failure.rankN.json. A gate that trips before training ends the run there; one that trips later leaves all its data.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunemap.files import read_json, sha256_of, write_json
from tunemap.flaws import let_through
from tunemap.gates import GateResult, disjoint_gate, label_gates, reason, tripped, truncation_gate
from tunemap.measure.clock import Moment, PartsTimer, process_age_s
from tunemap.run import Run
from tunemap.startup import quick_imports
from tunemap.training.failure import InvalidRunError, UnsupportedRunError, describe, leave_failure
from tunemap.training.heartbeat import STOP, Heartbeat
from tunemap.training.parent import end_with_parent

if TYPE_CHECKING:  # torch takes seconds to import, and a broken one must still end in an outcome
    from tunemap.data.batches import Schedule
    from tunemap.data.tokens import Tokens
    from tunemap.distributed.world import World
    from tunemap.training.assemble import Assembled

RESULT, PROGRESS, ENVIRONMENT = "result.json", "progress.json", "environment.json"
PLANNED = "gora.json"  # what a method decided from data; a resumed run must not decide anew
CHECKPOINT_SECONDS = 60.0
REPOSITORY = Path(__file__).resolve().parents[3]


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
    checkpoint_identity: str  # which checkpoints are this run's
    ceilings: Path | None  # measured matmul ceilings, where there are any


def main() -> None:
    """Train as one rank; the exit code is 0 only if this rank finished."""
    end_with_parent()
    job = _parse(sys.argv[1:])
    rank = int(os.environ.get("RANK", 0))
    progress = Progress(job.work, is_main=rank == 0)
    try:
        _train(job, progress)
    except _StoppedError as stopped:
        print(f"stopped after the checkpoint of step {stopped}", flush=True)
    except Exception as error:
        code = leave_failure(job.work, describe(error, rank=rank, phase=progress.phase, step=progress.step))
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)  # tearing down would wait for ranks that are stuck
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # everything is on disk; tearing the interpreter down would cost most of a second


class _StoppedError(Exception):
    """The launcher asked for an end, and the checkpoint is written."""


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
        """Keep the results of gates; before training, a fatal one that did not pass ends the run."""
        self.gates += results
        self._write()
        if trips := tripped(results):
            raise InvalidRunError(reason(trips))

    def _write(self, **details: Any) -> None:
        if self._is_main:
            gates = [asdict(gate) for gate in self.gates]
            write_json(self._work / PROGRESS, {"phase": self.phase, "step": self.step, "gates": gates, **details})


def _parse(arguments: list[str]) -> Job:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-file", type=Path, required=True)
    for name in ("model", "dataset", "tokens", "work", "weights"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--ceilings", type=Path)
    parser.add_argument("--checkpoint-identity", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    values = vars(parser.parse_args(arguments))
    run = Run.from_json(values.pop("run_file").read_text())
    return Job(run=run, **values)


def _train(job: Job, progress: Progress) -> None:
    run, factors = job.run, job.run.factors
    started = Moment.now(ago_s=process_age_s())
    parts = PartsTimer(since_process_start=True)
    with progress.during("load"), parts.part("load"):
        with quick_imports():
            import torch

            from tunemap.data.tokens import load_tokens
            from tunemap.distributed.world import join_world, leave_world
            from tunemap.training import checkpoint, steps
            from tunemap.training.assemble import assemble
            from tunemap.training.batches import schedule_of
            from tunemap.training.observe import Observer
        torch.set_num_threads(factors.threads_per_process)
        world = join_world(job.device, strategy=factors.strategy, expected_size=factors.gpus)
    if world.is_main:
        write_json(job.work / ENVIRONMENT, _environment(job, world))
    with progress.during("data"), parts.part("load"):
        tokens = load_tokens(job.tokens)
        progress.check(let_through(_data_gates(job, tokens), run.accept_flaws))
        schedule = schedule_of(factors, tokens, world)
        if factors.warmup_steps >= schedule.steps:  # where epochs decide, nobody knew before
            leaves = f"leaves nothing of the {schedule.steps} steps that {factors.epochs:g} epochs come to"
            raise UnsupportedRunError(f"warmup_steps {factors.warmup_steps} {leaves}")
    with progress.during("load"), parts.part("load"):
        found = checkpoint.find(job.work, world, identity=job.checkpoint_identity)
        known = found.manifest is not None and (job.work / PLANNED).exists()
        assembled = assemble(
            run,
            job.model,
            world,
            schedule,
            tokens,
            estimating=partial(parts.part, "estimation"),
            planned=read_json(job.work / PLANNED) if known else None,
        )
        state = assembled.state
        if world.is_main and "gora" in assembled.facts:
            write_json(job.work / PLANNED, assembled.facts["gora"])
        checkpoint.seed_everything(factors.seed, world.rank)
        earlier_s: dict[str, float] = {}
        if found.manifest is not None:
            checkpoint.restore(job.work, state, world, found.manifest)
            if not checkpoint.is_of_this_machine(found.manifest, world):
                print("the steps before are of another machine: their times are kept, and not averaged", flush=True)
                steps.leave_unmeasured(steps.rank_file(job.work, world.rank))
            earlier_s = found.manifest["parts_s"]
        if world.is_main:
            print(found.message, flush=True)
        progress.gates += let_through(assembled.gates, run.accept_flaws)
        observer = Observer(run, world, schedule, assembled)
    with progress.during("train"), parts.part("training"):
        _run_loop(job, progress, parts, earlier_s, world, tokens, schedule, assembled, observer)
    observer.after_training()
    with progress.during("save"), parts.part("save"):
        from tunemap.training.weights import save_weights

        save_weights(state.model, run, job.model, job.weights, world)
    ranks = world.gather(observer.of_rank(job.work))
    if world.is_main:
        seconds = parts.seconds()
        gates = progress.gates + observer.gates(ranks, label_tokens=tokens.train.label_tokens, parts_s=seconds)
        result = {
            "started": asdict(started),
            "memory": [rank["memory"] for rank in ranks],
            "parameters": asdict(assembled.parameters),
            "facts": assembled.facts | observer.facts(),
            "data_order_hash": schedule.order_hash,
            "steps_planned": schedule.steps,
            "flops": assembled.costs.per_step() if assembled.costs else None,
            "ceiling_flops_per_second": _ceiling(job, assembled, world),
            "energy": observer.energy(ranks),
            "communication": observer.communication_columns(),
            "communication_by_rank": [rank["communication"] for rank in ranks],
            "gates": [asdict(gate) for gate in gates],
        }
        write_json(job.work / RESULT, result | {"parts_s": parts.seconds(), "earlier_parts_s": earlier_s})
    world.barrier()
    leave_world()


def _run_loop(
    job: Job,
    progress: Progress,
    parts: PartsTimer,
    earlier_s: dict[str, float],
    world: World,
    tokens: Tokens,
    schedule: Schedule,
    assembled: Assembled,
    observer: Any,
) -> None:
    from tunemap.measure.memory import release_unused, reset_peaks
    from tunemap.training import checkpoint, steps
    from tunemap.training.batches import feed, micro_batches
    from tunemap.training.loop import Loop, NotFiniteError, TrainingState

    factors, state = job.run.factors, assembled.state
    first_step = state.step
    own_file = steps.rank_file(job.work, world.rank)
    steps.keep_until(own_file, first_step)
    saved_at = time.monotonic()
    heartbeat = Heartbeat(job.work, world.rank)

    def window_ended(state: TrainingState, loss: float) -> None:
        nonlocal saved_at
        progress.window(state.step, schedule.steps, loss, state.elapsed_s, first_step)
        observer.window_ended(state.step)
        every, window = factors.checkpoint_steps, factors.logging_steps
        late = time.monotonic() - saved_at > CHECKPOINT_SECONDS
        due = state.step // every > (state.step - window) // every if every else late
        stopping = (job.work / STOP).exists()
        if state.step < schedule.steps and world.sum(float(due or stopping)) > 0:
            with parts.part("checkpoint"):
                parts_s = {name: seconds + earlier_s.get(name, 0.0) for name, seconds in parts.seconds().items()}
                named = {"identity": job.checkpoint_identity, "strategy": factors.strategy}
                checkpoint.save(job.work, state, world, **named, parts_s=parts_s)
            saved_at = time.monotonic()
            if world.sum(float(stopping)) > 0:
                raise _StoppedError(state.step)

    loop = Loop(
        factors=factors,
        precision=assembled.precision,
        schedule=schedule,
        world=world,
        label_tokens=schedule.per_step(tokens.train.label_tokens).tolist(),
        loss_of=assembled.loss_of,
        write=lambda records: steps.append_records(own_file, records),
        window_ended=window_ended,
        watch=observer.watch,
        beat=heartbeat.beat,
        compiling=partial(parts.part, "compile") if factors.compile else nullcontext,
    )
    release_unused(world.device)
    reset_peaks(world.device)
    batches = micro_batches(tokens, schedule, world, first_step=first_step)
    try:
        loop.train(state, feed(batches, world.device))
    except NotFiniteError as error:  # gate finite_loss says so; what was measured until here is kept
        progress.step = state.step
        print(f"stopped: {error}", flush=True)
    heartbeat.stop()


def _data_gates(job: Job, tokens: Tokens) -> list[GateResult]:
    results = [disjoint_gate(read_json(job.dataset / "dataset.json"), tokens.statistics)]
    accepted = job.run.dataset.accept_truncation
    if tokens.task_kind == "classification":  # a class is there whatever is cut from its text
        return [*results, truncation_gate(tokens.statistics, accept_truncation=accepted)]
    return [*results, *label_gates(tokens.statistics, accept_truncation=accepted)]


def _environment(job: Job, world: World) -> dict[str, Any]:
    """The fingerprint of machine and software, with the content hashes of what the run was given."""
    from tunemap.measure.environment import environment

    inputs = {
        "model": sha256_of(job.model / "model.json"),
        "dataset": sha256_of(job.dataset / "dataset.json"),
        "tokens": sha256_of(job.tokens / "train.npz"),
    }
    return environment(REPOSITORY).as_dict() | {"device": str(world.device), "inputs": inputs}


def _ceiling(job: Job, assembled: Assembled, world: World) -> float | None:
    """The measured matmul ceiling of this device in the run's dtype; None where nobody measured it."""
    from tunemap.measure import ceiling

    if job.ceilings is None:
        return None
    dtype = str(assembled.precision.compute).removeprefix("torch.")
    measured = ceiling.load(job.ceilings, world.device).get(dtype)
    return measured.flops_per_s if measured else None


if __name__ == "__main__":
    main()
