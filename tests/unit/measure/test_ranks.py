"""The memory of a run from that of its ranks."""

from tunemap.measure.memory import CATEGORIES
from tunemap.measure.ranks import PARTS, memory_of_run


def rank(number, *parts, end=0):
    named = dict(zip(PARTS, parts, strict=True))
    return {"rank": number, "peak_allocated_bytes": sum(parts), "end_allocated_bytes": end} | named


def test_the_parts_sum_to_the_peak_when_ranks_need_more_of_different_things():
    found = memory_of_run([rank(0, 10, 1, 2, 30, 4, end=7), rank(1, 10, 1, 20, 5, 4, end=9)])
    assert found["peak_allocated_bytes"] == 47
    assert [found[name] for name in PARTS] == [10, 1, 2, 30, 4]
    assert found["end_allocated_bytes"] == 9  # which is no part
    assert "rank" not in found


def test_what_a_rank_does_not_know_is_empty():
    on_a_gpu = [{"rank": number, "peak_allocated_bytes": 5 + number} | dict.fromkeys(PARTS) for number in range(2)]
    assert memory_of_run(on_a_gpu) == {"peak_allocated_bytes": 6} | dict.fromkeys(PARTS)
    unknown = rank(1, 1, 1, 1, 1, 1) | {"peak_allocated_bytes": None}
    assert set(memory_of_run([rank(0, 1, 1, 1, 1, 1), unknown]).values()) == {None, 0}


def test_the_parts_are_those_of_the_tracker():
    assert tuple(f"{category}_bytes" for category in CATEGORIES) == PARTS
