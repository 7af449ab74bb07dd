"""The pause of the garbage collector while modules are imported, and memory that stays with a process."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from tunemap import startup
from tunemap.startup import collection_paused


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    yield
    gc.unfreeze()


def test_nothing_is_collected_while_modules_are_imported(without_torch):
    with collection_paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_the_imports_made_is_left_out_of_later_collections(without_torch):
    frozen = gc.get_freeze_count()
    with collection_paused():
        made = [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= frozen + len(made)


def test_a_failing_import_leaves_the_collector_on(without_torch):
    with pytest.raises(ImportError), collection_paused():
        raise ImportError("broken torch")
    assert gc.isenabled()


def test_garbage_of_a_process_that_has_torch_is_collected(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", gc)
    frozen = gc.get_freeze_count()
    with collection_paused():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


FREE_AND_TAKE = """
import resource, sys
from tunemap.startup import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
bytearray(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    bytearray(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_memory_that_was_freed_is_taken_again_without_page_faults():
    source = str(Path(startup.__file__).resolve().parents[1])
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", FREE_AND_TAKE, how], env={"PYTHONPATH": source}))
        for how in ("keep", "give back")
    }
    pages = 20 * (1 << 24) // 4096
    assert faults["keep"] < pages / 100
    assert faults["give back"] > 10 * faults["keep"]
