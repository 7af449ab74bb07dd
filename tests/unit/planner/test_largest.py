"""The search for the largest batch or length, against trying every one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunemap import corpora
from tunemap.cli import main
from tunemap.planner.largest import MOST, Largest, Probe, confirmed, largest_below, largest_power_below

GIB = 1 << 30


@given(
    base=st.integers(0, 1000),
    slope=st.integers(0, 50),
    curve=st.integers(0, 3),
    step=st.integers(1, 7),
    limit=st.integers(0, 20_000),
    most=st.integers(1, 300),
)
def test_the_search_finds_what_trying_all_would(base, slope, curve, step, limit, most):
    def needed(n):
        return base + slope * (n // step) + curve * n * n  # steps, as an allocator's, included

    expected = max((n for n in range(1, most + 1) if needed(n) <= limit), default=0)
    assert largest_below(needed, limit, most=most) == expected


@pytest.mark.parametrize("most", [1, 2, 48, 64])
def test_the_largest_power_of_two_takes_three_looks(most):
    for limit in range(70):
        looks = []

        def needed(n, looks=looks):
            looks.append(n)
            return n

        expected = max((1 << e for e in range(7) if 1 << e <= min(limit, most)), default=0)
        assert largest_power_below(needed, limit, most=most) == expected
        assert len(looks) <= 3


def test_a_straight_line_takes_few_looks():
    looks = []

    def needed(n):
        looks.append(n)
        return 1000 + 37 * n

    assert largest_below(needed, 1_000_000) == 27_000
    assert len(looks) < 8


def planned(safe=20, tight=24):
    return Largest("run", "per_device_batch_size", "gpu", GIB, safe, GIB // 2, tight, GIB)


def tried(largest):
    """A probe of a device that really holds `largest`, and the values that it was asked for."""
    asked = []

    def probe(value):
        asked.append(value)
        return Probe(value, "ok" if value <= largest else "oom", None, value <= largest)

    return probe, asked


@pytest.mark.parametrize("really", [1, 3, 7, 13, 19, 20, 22, 24, 25, 31, 47, 48])
def test_probes_find_what_the_device_really_holds(really):
    probe, asked = tried(really)
    found = confirmed(planned(), probe, most=MOST)
    assert found.confirmed == really
    assert len(asked) == len(set(asked)) == len(found.probes)


@pytest.mark.parametrize("really", [900, 1001, 1019, 1500, 1999])
def test_what_really_runs_is_known_to_two_percent(really):
    probe, asked = tried(really)
    found = confirmed(planned(safe=920, tight=1000), probe, most=MOST)
    assert really * 0.98 <= found.confirmed <= really
    assert len(asked) < 14


@pytest.mark.parametrize(("most", "end"), [(MOST, 48), (30, 30), (24, 24)])
def test_probes_end_at_twice_what_was_planned_and_at_the_most_that_makes_sense(most, end):
    probe, asked = tried(1000)
    assert confirmed(planned(), probe, most=most).confirmed == end
    assert max(asked) == end


def test_probes_of_a_device_that_holds_nothing_end_at_none():
    probe, asked = tried(0)
    assert confirmed(planned(), probe, most=MOST).confirmed == 0
    assert asked[-1] == 1


def test_what_may_just_fit_is_tried_where_nothing_is_safe():
    probe, asked = tried(1)
    assert confirmed(planned(safe=0, tight=1), probe, most=MOST).confirmed == 1
    assert asked == [1, 2]


def test_no_probe_is_made_where_nothing_is_planned_to_fit():
    probe, asked = tried(9)
    assert confirmed(planned(safe=0, tight=0), probe, most=MOST).confirmed == 0
    assert asked == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-gb", "-1"], "--memory-gb -1: allowed are numbers above 0"),
        (["--memory-gb", "nan"], "--memory-gb nan: allowed are numbers above 0, up to 1,000,000"),
        (["--memory-gb", "1e300"], "--memory-gb 1e+300: allowed are numbers above 0, up to 1,000,000"),
        (["--gpu", "h100", "--probe"], "--probe runs on this machine's device"),
    ],
)
def test_wrong_arguments_are_explained(repository, capsys, arguments, message):
    study = str(repository / "config" / "config.yaml")
    assert main(["max-batch", "tiny-qwen2.arithmetic.lora.seed-0", "--study", study, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_base_model_has_no_batch(repository, capsys):
    study = str(repository / "config" / "config.yaml")
    assert main(["max-batch", "tiny-qwen2.arithmetic.base", "--study", study]) == 1
    assert "is not trained" in capsys.readouterr().err


def test_no_length_is_found_that_the_model_was_not_made_for(repository, tmp_path, capsys):
    study = str(repository / "config" / "config.yaml")
    roomy = ["--memory-gb", "4000", "--factor", "max_length", "--json", "--results", str(tmp_path)]
    assert main(["max-batch", "tiny-qwen2.arithmetic.lora.seed-0", "--study", study, *roomy]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["safe"] == found["tight"] == corpora.POSITIONS
