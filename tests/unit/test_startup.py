"""The pause of the garbage collector, and of the compiler, while modules are imported."""

import gc
import os
import subprocess
import sys

import pytest

from tunemap.startup import quick_imports


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    yield
    gc.unfreeze()


def test_nothing_is_collected_while_modules_are_imported(without_torch):
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_the_imports_made_is_left_out_of_later_collections(without_torch):
    frozen = gc.get_freeze_count()
    with quick_imports():
        made = [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= frozen + len(made)


def test_a_failing_import_leaves_the_collector_on(without_torch):
    with pytest.raises(ImportError), quick_imports():
        raise ImportError("broken torch")
    assert gc.isenabled()


def test_garbage_of_a_process_that_has_torch_is_collected(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", gc)
    frozen = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


IMPORTS = """
import sys
from tunemap.startup import quick_imports
with quick_imports():
    import peft
print("torch._inductor.compile_fx" in sys.modules)
import torch
from torch._dynamo.testing import CompileCounter
counter = CompileCounter()
torch.compile(lambda x: x + 1, backend=counter)(torch.ones(1))
print(counter.frame_count)
"""


def test_libraries_compile_nothing_for_themselves_and_a_run_that_asks_still_does():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"]


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_what_the_user_says_of_the_compiler_holds_after_a_failed_import(monkeypatch, before):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", before)
    with pytest.raises(ImportError), quick_imports():
        raise ImportError("broken bitsandbytes")
    assert os.environ.get("TORCHDYNAMO_DISABLE") == before
