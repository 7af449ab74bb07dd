"""The figure of scaling: speed-ups and efficiencies at their places, intervals as they are, failures crossed."""

import pandas as pd
import pytest

from tunemap.config import Factors
from tunemap.report.scaling_figure import draw_scaling
from tunemap.report.scene import FAILURE_COLOUR, MARKERS, METHOD_COLOURS, Scene


def run(gpus, tokens_per_second, *, seed=0, method="lora", strategy="ddp", outcome="ok", **factors):
    row = Factors(strategy=strategy, gpus=gpus, seed=seed).model_dump() | factors
    row |= {"model": "m", "dataset": "d", "method": method, "method_kind": method, "rank": 8, "outcome": outcome}
    return row | {"tokens_per_second": tokens_per_second, "run": "-".join(map(str, (gpus, seed, *factors.values())))}


def scene(*runs):
    methods = ["full", "lora"]
    colours = dict(zip(methods, METHOD_COLOURS, strict=False))
    markers = dict(zip(methods, MARKERS, strict=False))
    return Scene("e", [], pd.DataFrame(runs), pd.DataFrame(), colours, [], markers=markers)


def lines(axes, colour=None):
    return [line for line in axes.lines if colour is None or line.get_color() == colour]


REPEATS = [run(1, v, seed=s) for s, v in enumerate((100.0, 102.0, 98.0))]
REPEATS += [run(2, v, seed=s) for s, v in enumerate((180.0, 190.0, 185.0))]


def test_speed_up_and_efficiency_stand_over_the_number_of_devices_with_their_interval():
    figure, caption, alt = draw_scaling(scene(*REPEATS))
    speed_up, efficiency = figure.axes
    curve, interval = lines(speed_up, METHOD_COLOURS[1])
    assert list(curve.get_xdata()) == [1, 2]
    assert list(curve.get_ydata()) == [1, pytest.approx(1.85, abs=0.01)]
    low, high = interval.get_ydata()
    assert low < curve.get_ydata()[1] < high
    shares, _ = lines(efficiency, METHOD_COLOURS[1])
    assert list(shares.get_ydata()) == [100, pytest.approx(92.5, abs=0.5)]
    assert list(lines(speed_up)[0].get_ydata()) == [1, 2]  # ideal
    assert list(lines(efficiency)[0].get_ydata()) == [100, 100]
    assert "n = 3 runs per point" in caption
    assert "failed" not in caption
    assert "arrow" not in caption
    assert "lora · ddp: 1 1.00 and 100 %, 2 1.85 and 92 %" in alt


def test_an_interval_from_two_runs_does_not_squeeze_the_values():
    runs = [run(1, v, seed=s) for s, v in enumerate((100.0, 101.0))]
    runs += [run(2, v, seed=s) for s, v in enumerate((120.0, 250.0))]
    figure, caption, _ = draw_scaling(scene(*runs))
    speed_up = figure.axes[0]
    assert speed_up.get_ylim() == (0, pytest.approx(2.3))
    arrows = [
        line for line in lines(speed_up, METHOD_COLOURS[1]) if line.get_marker() == "^" and len(line.get_xdata()) == 1
    ]
    assert [list(arrow.get_ydata()) for arrow in arrows] == [[pytest.approx(2.3)]]
    assert "An arrow at the top: the interval goes on beyond the frame" in caption


def test_each_method_and_strategy_has_a_curve_of_its_own():
    runs = [
        run(n, 100.0 * n**0.5, method=m, strategy=s) for n in (1, 4) for m in ("full", "lora") for s in ("ddp", "fsdp")
    ]
    figure, _, _ = draw_scaling(scene(*runs))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "full · ddp", "full · fsdp", "lora · ddp", "lora · fsdp",
    ]  # fmt: skip
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines[1:]}
    assert len(styles) == 4


def test_curves_that_differ_in_other_factors_are_not_joined():
    runs = [run(n, 100.0 * n, precision=p) for n in (1, 2) for p in ("fp32", "bf16")]
    runs += [run(n, 10.0 * n, per_device_batch_size=2) for n in (1, 2)]
    figure, _, _ = draw_scaling(scene(*runs))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "lora · ddp · batch 8 each · precision fp32",
        "lora · ddp · batch 8 each · precision bf16",
        "lora · ddp · batch 2 each",
    ]
    assert len({handle.get_fillstyle() for handle in figure.legends[0].get_lines()}) == 3


def test_points_with_failed_runs_are_crossed():
    some = run(2, float("nan"), seed=3, outcome="oom")
    every = run(4, float("nan"), outcome="error")
    figure, caption, alt = draw_scaling(scene(*REPEATS, some, every))
    crosses = lines(figure.axes[0], FAILURE_COLOUR)
    assert [list(cross.get_xdata()) for cross in crosses] == [[2], [4]]
    assert [cross.get_ydata()[0] for cross in crosses] == [pytest.approx(1.85, abs=0.01), 0]
    assert "A cross marks points with runs that failed (2 in all)" in caption
    assert "4 unknown with 1 failed" in alt


def test_a_failure_crosses_no_point_of_a_curve_with_other_factors():
    runs = [run(n, 100.0 * n, gradient_checkpointing=on) for n in (1, 2) for on in (False, True)]
    runs[-1] |= {"outcome": "oom", "tokens_per_second": float("nan")}
    figure, caption, alt = draw_scaling(scene(*runs))
    assert [list(cross.get_ydata()) for cross in lines(figure.axes[0], FAILURE_COLOUR)] == [[0]]
    assert "(1 in all)" in caption
    assert "lora · ddp · no gradient checkpointing: 1 1.00 and 100 %, 2 2.00 and 100 %." in alt
    assert "lora · ddp · gradient checkpointing: 1 1.00 and 100 %, 2 unknown with 1 failed" in alt


def test_a_failed_run_on_no_curve_is_not_counted():
    _, caption, _ = draw_scaling(scene(*REPEATS, run(8, float("nan"), outcome="oom", max_length=64)))
    assert "failed" not in caption


def test_without_a_baseline_on_one_device_there_is_no_figure():
    assert draw_scaling(scene(run(2, 100.0), run(4, 200.0))) is None
    assert draw_scaling(scene(run(1, 100.0), run(1, 101.0, seed=1))) is None
