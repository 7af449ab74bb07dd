"""Whatever happened to a file: facts or one clear message, never another exception."""

import random

import pytest
import trace_generator as generator

from tunemap.errors import UserError
from tunemap.trace.command import read_traces
from tunemap.trace.facts import compute_facts


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    ranks = generator.generate(300, processes=2, steps=2)
    generator.write_nsys(folder / "report.sqlite", ranks)
    generator.write_kineto(folder / "rank0.json", ranks[0], 2)
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut, or with some bytes replaced by any other or by one that means something in JSON."""
    if rng.random() < 0.15:
        return data[: rng.randrange(1, len(data))]
    damaged, any_byte = bytearray(data), rng.random() < 0.5
    for _ in range(rng.choice([1, 3, 20, 200])):
        damaged[rng.randrange(len(data))] = rng.randrange(256) if any_byte else rng.choice(b'0123456789-.,"{}[]:e')
    return bytes(damaged)


@pytest.mark.parametrize("suffix", [".sqlite", ".json"])
def test_random_damage_ends_in_facts_or_a_message(originals, tmp_path, suffix):
    rng = random.Random(suffix)
    outcomes = set()
    for number in range(60):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(damage(originals[suffix], rng))
        try:
            compute_facts(read_traces([path]))
            outcomes.add("facts")
        except UserError:
            outcomes.add("message")
        path.unlink()
    assert outcomes == {"facts", "message"}
