"""The pause of the garbage collector while modules are imported."""

import gc
import sys

import pytest

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
