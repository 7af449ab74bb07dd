"""Every strategy computes what one process computes on the same global batches."""

import numpy as np
import pytest

STRATEGIES = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hybrid", 4)]
VARIANTS = [{}, {"gradient_checkpointing": True, "gradient_accumulation": 2}]


def assert_same_trajectory(finished, reference):
    expected = reference.column("loss")
    assert len(expected) == 6
    assert expected[-1] < 0.985 * expected[0]  # it learns, so that equal losses mean equal updates
    np.testing.assert_allclose(finished.column("loss"), expected, rtol=1e-5)
    np.testing.assert_allclose(finished.column("gradient_norm"), reference.column("gradient_norm"), rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "checkpointed-accumulated"])
@pytest.mark.parametrize(("strategy", "world_size"), STRATEGIES)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_losses_are_those_of_one_process(trained, method, strategy, world_size, variant):
    assert_same_trajectory(trained(method, strategy, world_size, **variant), trained(method))
