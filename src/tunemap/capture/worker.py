"""One process of a capture: the first steps of a run, the last few of them under torch.profiler.

    python -m tunemap.capture.worker --run-file run.json --model DIR --tokens DIR --folder DIR --device cpu

Leaves trace.rankN.json.gz in the folder, and capture.rankN.json: steps captured and their time under the profiler.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunemap.files import write_json
from tunemap.run import Run
from tunemap.training.failure import describe, write_failure
from tunemap.training.parent import end_with_parent

if TYPE_CHECKING:  # torch takes seconds to import, and a broken one must still end in an outcome
    from tunemap.data.collate import Batch
    from tunemap.distributed.world import World
    from tunemap.training.steps import StepRecord

WARMUP_STEPS = 5  # before the window: allocator, autotuning and lazy initialisation are over
CAPTURED_STEPS = 3


def main() -> None:
    """Capture as one rank; the exit code is 0 only if this rank left its trace."""
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    for name in ("run-file", "model", "tokens", "folder"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        _capture(arguments)
    except Exception as error:
        rank = int(os.environ.get("RANK", 0))
        write_failure(arguments.folder, describe(error, rank=rank, phase="capture", step=None))
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # tearing down would wait for ranks that are stuck
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # everything is on disk; tearing the interpreter down would cost most of a second


def shortened(run: Run) -> Run:
    """The same run, ended after the captured steps, with nothing read from the device before."""
    steps = WARMUP_STEPS + CAPTURED_STEPS
    changes = {"max_steps": steps, "epochs": None, "logging_steps": steps, "warmup_steps": 0}
    return run.model_copy(update={"factors": run.factors.model_copy(update=changes)})


def _capture(arguments: argparse.Namespace) -> None:
    import torch

    from tunemap.data.tokens import load_tokens
    from tunemap.distributed.world import join_world, leave_world
    from tunemap.training.assemble import assemble
    from tunemap.training.batches import feed, micro_batches, schedule_of
    from tunemap.training.checkpoint import seed_everything
    from tunemap.training.loop import Loop

    run = shortened(Run.from_json(arguments.run_file.read_text()))
    factors = run.factors
    torch.set_num_threads(factors.threads_per_process)
    world = join_world(arguments.device, strategy=factors.strategy, expected_size=factors.gpus)
    tokens = load_tokens(arguments.tokens)
    schedule = schedule_of(factors, tokens, world)
    assembled = assemble(run, arguments.model, world, schedule, tokens)
    state = assembled.state
    state.memory = {}  # the memory tracker stays out of the window
    seed_everything(factors.seed, world.rank)
    records: list[StepRecord] = []
    loop = Loop(
        factors=factors,
        precision=assembled.precision,
        schedule=schedule,
        world=world,
        label_tokens=schedule.per_step(tokens.train.label_tokens).tolist(),
        write=records.extend,
        window_ended=lambda state, loss: None,
    )
    profiler = _profiler(world)
    batches = feed(micro_batches(tokens, schedule, world, first_step=0, attention=factors.attention), world.device)
    loop.train(state, _starting(profiler, batches, WARMUP_STEPS * factors.gradient_accumulation, world))
    profiler.stop()
    profiler.export_chrome_trace(str(arguments.folder / f"trace.rank{world.rank}.json.gz"))
    captured = records[WARMUP_STEPS:]
    write_json(
        arguments.folder / f"capture.rank{world.rank}.json",
        {
            "rank": world.rank,
            "first_step": WARMUP_STEPS,
            "steps": len(captured),
            "step_time_mean_s": sum(record.step_time_s for record in captured) / len(captured),
        },
    )
    world.barrier()
    leave_world()


def _profiler(world: World) -> Any:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, record_shapes=True)  # shapes give the bytes of collectives


def _starting(profiler: Any, batches: Iterator[Batch], first: int, world: World) -> Iterator[Batch]:
    """Pass the batches on; start the profiler on all ranks together before number `first` is made."""
    for index in range(sys.maxsize):
        if index == first:
            world.barrier()
            profiler.start()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch


if __name__ == "__main__":
    main()
