"""What is left out while modules are imported: garbage collection, the compiler, reading sources twice."""

import gc
import os
import subprocess
import sys

import pytest

from tunemap.startup import quick_imports


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)


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


READS = """
import builtins, os, sys
opened, plain_open = [], open
def open_and_note(file, *given, **options):
    opened.append(str(file))
    return plain_open(file, *given, **options)
builtins.open = open_and_note
from contextlib import nullcontext
from tunemap.startup import quick_imports
with quick_imports() if sys.argv[1] == "quick" else nullcontext():
    from transformers import AutoModelForCausalLM, PreTrainedModel, models
print(sum(name.endswith(os.path.join("bert", "modeling_bert.py")) for name in opened))
print(sorted(dir(models)))
import transformers.loss.loss_utils, transformers.utils
print("scipy" in sys.modules, transformers.utils.is_scipy_available())
"""


def test_transformers_reads_its_sources_once_and_knows_the_same_of_them_and_leaves_scipy_out():
    quick, plain = (
        subprocess.run([sys.executable, "-c", READS, how], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        for how in ("quick", "plain")
    )
    assert (quick[0], plain[0]) == ("1", "2")
    assert quick[1] == plain[1]
    assert (quick[2], plain[2]) == ("False True", "True True")


def test_nothing_is_patched_where_the_models_are_known_already():
    from transformers import models, utils  # noqa: F401

    before = utils.is_scipy_available, utils.import_utils.create_import_structure_from_path
    with quick_imports():
        assert (utils.is_scipy_available, utils.import_utils.create_import_structure_from_path) == before


def test_a_broken_transformers_is_reported_where_it_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers"), quick_imports():
        import transformers  # noqa: F401
