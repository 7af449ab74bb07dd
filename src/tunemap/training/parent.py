"""Ends a process together with the one that started it, however that one ends.

torchrun puts each worker into a session of its own: killing torchrun's process group leaves the workers alive, and a
launcher that is killed leaves torchrun alive, training into files that the next start writes too. Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

VARIABLE = "TUNEMAP_END_WITH_PARENT"  # set by the launcher; profilers start workers from threads that come and go
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, if the launcher wants it and this is Linux."""
    if os.environ.get(VARIABLE) == "1" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
