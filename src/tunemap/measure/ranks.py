"""The memory of a run from that of its ranks.

Imports no torch: the launcher makes the numbers, and `tunemap verify` makes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PEAK = "peak_allocated_bytes"
PARTS = ("parameters_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "other_bytes")  # of the peak


def memory_of_run(ranks: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """Column by column the largest over ranks; empty where a rank does not know it.

    The parts of the peak are those of the rank that has the largest one: the largest of each would not sum to it.
    """
    values = {name: [rank[name] for rank in ranks] for name in ranks[0] if name != "rank"}
    largest = {name: None if None in known else max(known) for name, known in values.items()}
    fullest = {} if largest.get(PEAK) is None else max(ranks, key=lambda rank: int(rank[PEAK]))
    return largest | {name: fullest.get(name) for name in PARTS if name in largest}
