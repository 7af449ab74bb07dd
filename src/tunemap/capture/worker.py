"""One process of a capture: the first steps of a run, the last few of them in the window of a profiler.

    python -m tunemap.capture.worker --run-file run.json --model DIR --tokens DIR --folder DIR --device cpu

Leaves capture.rankN.json in the folder: steps captured and their time under the profiler. With backend torch it leaves
trace.rankN.json.gz beside it; with nsys or ncu the process runs under that program, which writes, and only says when.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunemap.files import write_json
from tunemap.run import Run
from tunemap.startup import quick_imports
from tunemap.training.failure import describe, leave_failure
from tunemap.training.parent import end_with_parent

if TYPE_CHECKING:  # torch takes seconds to import, and a broken one must still end in an outcome
    from tunemap.data.collate import Batch
    from tunemap.distributed.world import World
    from tunemap.training.steps import StepRecord

WARMUP_STEPS = 5  # before the window: allocator, autotuning and lazy initialisation are over
CAPTURED_STEPS = {"torch": 3, "nsys": 3, "ncu": 1}  # ncu runs each kernel many times over


def main() -> None:
    """Capture as one rank; the exit code is 0 only if this rank left its trace."""
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--backend", choices=["torch", "nsys", "ncu"], required=True)
    for name in ("run-file", "model", "tokens", "folder"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        _capture(arguments)
    except Exception as error:
        rank = int(os.environ.get("RANK", 0))
        code = leave_failure(arguments.folder, describe(error, rank=rank, phase="capture", step=None))
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)  # tearing down would wait for ranks that are stuck
    sys.stdout.flush()
    sys.stderr.flush()
    if arguments.backend != "torch":
        return  # nsys and ncu write when the interpreter ends
    os._exit(0)  # everything is on disk; tearing the interpreter down would cost most of a second


def shortened(run: Run, backend: str) -> Run:
    """The same run, ended after the captured steps, with nothing read from the device before."""
    steps = WARMUP_STEPS + CAPTURED_STEPS[backend]
    changes = {"max_steps": steps, "epochs": None, "logging_steps": steps, "warmup_steps": 0}
    return run.model_copy(update={"factors": run.factors.model_copy(update=changes)})


def _capture(arguments: argparse.Namespace) -> None:
    with quick_imports():
        import torch

        from tunemap.data.tokens import load_tokens
        from tunemap.distributed.world import join_world, leave_world
        from tunemap.training.assemble import assemble
        from tunemap.training.batches import feed, micro_batches, schedule_of
        from tunemap.training.checkpoint import seed_everything
        from tunemap.training.loop import Loop

    whole = Run.from_json(arguments.run_file.read_text())
    run = shortened(whole, arguments.backend)
    factors = run.factors
    torch.set_num_threads(factors.threads_per_process)
    world = join_world(arguments.device, strategy=factors.strategy, expected_size=factors.gpus)
    tokens = load_tokens(arguments.tokens)
    schedule = schedule_of(factors, tokens, world)
    # A method's schedule of its own, such as AdaLoRA's, is that of the whole run: what is traced are its first steps.
    total_steps = schedule_of(whole.factors, tokens, world).steps
    assembled = assemble(run, arguments.model, world, schedule, tokens, total_steps=total_steps)
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
        loss_of=assembled.loss_of,
        write=records.extend,
        window_ended=lambda state, loss: None,
    )
    trace = arguments.folder / f"trace.rank{world.rank}.json.gz"
    window: Window = TorchWindow(world, trace) if arguments.backend == "torch" else OutsideWindow(world)
    if arguments.backend == "nsys" and world.device.type == "cuda":
        loop.name_phase = torch.cuda.nvtx.range
    batches = feed(micro_batches(tokens, schedule, world, first_step=0), world.device)
    loop.train(state, _starting(window, batches, WARMUP_STEPS * factors.gradient_accumulation))
    window.stop()
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


class Window(Protocol):
    """What is traced: from `start` to `stop`, which every rank calls."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class TorchWindow:
    """torch.profiler in each process; the trace is written at the end."""

    def __init__(self, world: World, trace: Path) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler: Any = profile(activities=activities, record_shapes=True)  # shapes give bytes of collectives
        self._world, self._trace = world, trace

    def start(self) -> None:
        """Trace from here."""
        self._world.barrier()
        self._profiler.start()

    def stop(self) -> None:
        """Trace no more, and write."""
        _wait_for(self._world)
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self._trace))


class OutsideWindow:
    """Says to the profiler around this process when to record: the first rank that says so starts, the first stops."""

    def __init__(self, world: World) -> None:
        self._world = world

    def start(self) -> None:
        """Record from here; every rank is here, with an idle device."""
        self._say("start")

    def stop(self) -> None:
        """Record no more; no rank has anything left to do."""
        self._say("stop")

    def _say(self, what: str) -> None:
        import torch

        _wait_for(self._world)
        self._world.barrier()
        if self._world.device.type == "cuda":
            getattr(torch.cuda.profiler, what)()
        self._world.barrier()


def _wait_for(world: World) -> None:
    """Wait until the device is idle; torch flushes the profiler of the default device only."""
    import torch

    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _starting(window: Window, batches: Iterator[Batch], first: int) -> Iterator[Batch]:
    """Pass the batches on; open the window before number `first` is made."""
    for index in range(sys.maxsize):
        if index == first:
            window.start()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch


if __name__ == "__main__":
    main()
