"""torchrun, which besides says how each rank ended that could not say it itself.

    python -m tunemap.training.torchrun WORK_FOLDER [arguments of torchrun]

A rank that the kernel kills (out of memory, a fault in a driver) leaves no message. Its partners then complain about
a closed connection, which names nobody. torchrun sees the exit code of each, so the message is written here.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from tunemap.training.failure import Failure, failure_file, how_it_ended, write_failure
from tunemap.training.heartbeat import read_beats
from tunemap.training.parent import end_with_parent


def main() -> None:
    """Run the ranks; the exit code is 0 only if all of them finished."""
    end_with_parent()
    work = Path(sys.argv[1])
    try:
        run(parse_args(sys.argv[2:]))
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for failure in silent_failures(codes, work):
            write_failure(work, failure)
        raise SystemExit(1) from None


def silent_failures(exit_codes: dict[int, int], work: Path) -> list[Failure]:
    """Failures of the ranks that left no message; those that torchrun itself ended (SIGTERM) are no cause."""
    beats = {beat.rank: beat for beat in read_beats(work)}
    failures = []
    for rank, code in sorted(exit_codes.items()):
        if code in (0, -signal.SIGTERM) or failure_file(work, rank).exists():
            continue
        beat = beats.get(rank)
        phase, step = ("train", beat.step) if beat else (None, None)
        failures.append(Failure("error", f"rank {rank}: {how_it_ended(code)}", rank, phase, step, None))
    return failures


if __name__ == "__main__":
    main()
