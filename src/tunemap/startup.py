"""A quick start of processes that import torch, transformers and peft: thousands of modules, hardly any garbage."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_NO_COMPILER = "TORCHDYNAMO_DISABLE"  # torch reads it at each use of torch.compile


@contextmanager
def quick_imports() -> Iterator[None]:
    """Wrap around the first import of torch, transformers and peft; it takes half of the time.

    No garbage is collected meanwhile, nothing is compiled that a library wants compiled for itself, and transformers
    reads its sources once and leaves scipy out (benchmarks/startup.py measures all of it).
    """
    with ExitStack() as stack:
        stack.enter_context(_no_compilation())
        if "torch" not in sys.modules and gc.isenabled():  # where it is, the heap holds other things to collect
            stack.enter_context(_collection_paused())
        stack.enter_context(_less_of_transformers())
        yield


@contextmanager
def _collection_paused() -> Iterator[None]:
    """No garbage collection while torch and its company are imported, and none of what they made afterwards.

    The collector would look through the growing heap again and again: a seventh of the time of these imports. What
    they leave, half a million objects, lives to the end of the process. Without the freeze a full collection would
    walk over it, for a quarter of a second, in the middle of a timed step.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _no_compilation() -> Iterator[None]:
    """No `torch.compile` by the modules imported meanwhile; afterwards it does what it did before.

    bitsandbytes 0.50 compiles functions of its slow path when it is imported. That alone brings in torch's compiler,
    550 modules and a sixth of the time of all imports; and a run that uses such a function would compile in the
    middle of a step that nobody asked to be compiled.
    """
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = before


@contextmanager
def _less_of_transformers() -> Iterator[None]:
    """Transformers without what no run of ours needs, where it has not been imported yet.

    To learn what its models export it reads all 1,700 of their sources when it is imported, and again, since it asks by
    the name of a file in place of a folder, when the first of them is; it remembers them now. And nothing is detected
    in images here, for whose losses it imports scipy.optimize, 390 modules.
    """
    try:
        from transformers import utils
        from transformers.utils import import_utils

        read, scipy_is_there = import_utils.create_import_structure_from_path, utils.is_scipy_available
        is_new = "transformers.models" not in sys.modules
    except Exception:  # whoever needs transformers imports it again, and says what is wrong
        is_new = False
    if not is_new:
        yield
        return
    models = Path(import_utils.__file__).parents[1] / "models"
    asked_for = str(models / "__init__.py")
    import_utils.create_import_structure_from_path = lambda path: read(models if path == asked_for else path)
    utils.is_scipy_available = lambda: False
    try:
        yield
    finally:
        utils.is_scipy_available = scipy_is_there
