"""One server of forked ranks and one tiny model for all tests of this folder; runs that several tests look at."""

import pytest

from tests import forked
from tests.distributed import ranks


@pytest.fixture(scope="session")
def material(repository, tmp_path_factory) -> ranks.Material:
    """A random Qwen2 of two blocks with 64 examples."""
    forked.start_server(repository)
    return ranks.prepare_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def trained(material, tmp_path_factory):
    """Runs by their factors, each trained once for all tests that ask for it."""
    finished: dict[str, ranks.Finished] = {}

    def train(method: str, strategy: str = "single", world_size: int = 1, **factors) -> ranks.Finished:
        key = repr((method, strategy, world_size, sorted(factors.items())))
        if key not in finished:
            run = ranks.make_run(method, strategy, world_size, **factors)
            finished[key] = ranks.train(run, material, tmp_path_factory.mktemp(run.id))
        return finished[key]

    return train
