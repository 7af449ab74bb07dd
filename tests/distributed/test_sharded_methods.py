"""Every method of peft that may be sharded trains over two processes as in one, and saves the same adapter."""

import json
from typing import Any

import pytest

from tests.distributed import ranks, sharded
from tests.forked import fork
from tunemap.methods.sharding import UNSHARDABLE


@pytest.fixture(scope="module")
def seen(material, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """By type: losses of each process, alone and sharded, and how far the saved adapters are apart."""
    folder, port = tmp_path_factory.mktemp("sharded"), ranks.free_port()
    processes = [fork(sharded.train_all, rank, port, folder) for rank in range(2)]
    for process in processes:
        process.join(ranks.WAIT_SECONDS)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return json.loads((folder / "seen.json").read_text())


def test_every_type_is_sharded_or_has_a_reason(seen):
    from tunemap.methods.peft_types import SUPPORTED

    assert seen.keys() | UNSHARDABLE.keys() == SUPPORTED.keys() - {*sharded.NOT_HERE}
    assert not seen.keys() & UNSHARDABLE.keys()


def test_losses_are_those_of_one_process(seen):
    for name, found in seen.items():
        assert found["sharded"] == pytest.approx(found["alone"], rel=1e-5), name
        assert len(set(found["alone"])) == sharded.STEPS, name


def test_saved_adapters_are_those_of_one_process(seen):
    for name, found in seen.items():
        assert found["tensors"] > 0, name
        assert found["apart"] < 1e-4, name
