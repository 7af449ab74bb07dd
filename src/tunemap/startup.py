"""A quick start of processes that import torch, transformers and peft: thousands of modules, hardly any garbage."""

from __future__ import annotations

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
