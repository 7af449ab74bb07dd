"""A quick start of processes that import torch, transformers and peft, and an allocator that suits their tensors."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection while torch and its company are imported, and none of what they made afterwards.

    The collector would look through the growing heap again and again: a fifth of the time of these imports. What
    they leave, half a million objects, lives to the end of the process. Without the freeze a full collection would
    walk over it, for a quarter of a second, in the middle of a timed step.

    Does nothing where torch is imported already: then the heap holds other things, whose garbage has to go.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees, from now on; does nothing elsewhere.

    It would give each large tensor back to the system and ask for it again in the next step, page by page: a quarter
    of a small model's step. The launcher says the same to its workers by variables (`launch.KEEP_FREED_MEMORY`).
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # never
