"""The waterfall: bars between two totals add up to their difference, and the chain starts at the baseline."""

import pandas as pd
import pytest

from tunemap.report.scene import METHOD_COLOURS, Scene
from tunemap.report.waterfall_figure import MEMORY_PARTS, STEP_PARTS, draw_waterfall


def point(label, *, seconds, mebibytes, seeds=3, method_kind="lora"):
    row = {"point": label, "method": label, "method_kind": method_kind, "model": "m", "dataset": "d", "seeds": seeds}
    row |= dict(zip(STEP_PARTS, seconds, strict=True))
    row |= {name: size * 2**20 for name, size in zip(MEMORY_PARTS, mebibytes, strict=True)}
    return row | {"peak_allocated_bytes": sum(mebibytes) * 2**20}


FULL = point("full", seconds=(0.001, 0.010, 0.020, 0.005), mebibytes=(40, 40, 80, 30, 4))
LORA = point("lora", seconds=(0.001, 0.011, 0.015, 0.001), mebibytes=(42, 2, 4, 34, 4))


def scene(*points, baseline="full"):
    colours = {one["method"]: METHOD_COLOURS[index] for index, one in enumerate(points)}
    return Scene("e", list(points), pd.DataFrame(), pd.DataFrame(), colours, [], baselines={("m", "d"): baseline})


def bars(axes):
    return [(patch.get_y(), patch.get_y() + patch.get_height()) for patch in axes.patches]


def test_the_steps_lead_from_one_total_to_the_next():
    figure, _, alt = draw_waterfall(scene(LORA, FULL))
    time, memory = figure.axes
    labels = [label.get_text() for label in time.get_xticklabels()]
    assert labels == ["full", "data", "forward", "backward", "optimizer", "lora"]
    (_, first), *changes, (_, last) = bars(time)
    assert (first, last) == (pytest.approx(36), pytest.approx(28))
    level = first
    for name, (low, high) in zip(STEP_PARTS, changes, strict=True):
        change = 1e3 * (LORA[name] - FULL[name])
        assert (low, high) == (pytest.approx(min(level, level + change)), pytest.approx(max(level, level + change)))
        level += change
    assert level == pytest.approx(last)
    assert [text.get_text() for text in memory.texts] == ["194", "−38", "−76", "+4", "86"]
    assert "full 36.0, lora 28.0" in alt


def test_a_point_without_a_breakdown_is_left_out_and_said_to_be():
    broken = LORA | {"point": "broken", "optimizer_bytes": None}
    _, caption, _ = draw_waterfall(scene(FULL, broken, LORA))
    assert "From full part by part to lora" in caption
    assert "1 more points are in the table" in caption


def test_one_point_makes_no_waterfall():
    assert draw_waterfall(scene(FULL)) is None
    assert draw_waterfall(scene(FULL, LORA | {"forward_time_mean_s": None})) is None
