"""Figures show what the facts say."""

import numpy as np
import pytest
from test_facts import ADD, GEMM, NCCL, make

from tunemap.trace.compare import compare_facts
from tunemap.trace.facts import FactOptions, compute_facts
from tunemap.trace.figures import (
    copies_figure,
    draw_facts,
    draw_waterfall,
    phases_figure,
    shares_figure,
    timeline_figure,
    waterfall_figure,
)

TRACE = make(
    kernels=[(GEMM, 0, 400, 1), (NCCL, 300, 600, 2), (ADD, 900, 1000, 3)],
    copies=[(8, 600, 700, 5000), (10, 100, 200, 700, -1, 1)],
    calls=[("cudaLaunchKernel", 0, 1, 1), ("cudaLaunchKernel", 60, 70, 2), ("cudaLaunchKernel", 71, 80, 3)],
    ranges=[("forward", 0, 50), ("backward", 50, 100), ("step 1", 0, 1000)],
)
FACTS = compute_facts(TRACE, options=FactOptions(bucket_ns=500))


def test_share_bars_fill_the_window():
    (axes,) = shares_figure({"A": FACTS, "B": FACTS}).axes
    widths = np.array([[bar.get_width() for bar in group] for group in axes.containers])
    assert widths[:, 0].tolist() == pytest.approx([50, 20, 10, 20])
    assert widths.sum(axis=0).tolist() == pytest.approx([100, 100])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["A process 0, GPU 0", "B process 0, GPU 0"]


def test_the_heat_map_has_only_cells_that_occur():
    axes = phases_figure(FACTS).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["forward", "backward"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["gemm", "communication", "elementwise"]
    cells = axes.collections[0].get_array().reshape(3, 2)
    assert np.ma.filled(cells * 1e6, -1).tolist() == pytest.approx(np.array([[400, -1], [-1, 200], [-1, 100]]))


def test_copies_within_and_between_devices_have_their_own_panels():
    local, peer = copies_figure(FACTS).axes
    assert (local.get_title("left"), peer.get_title("left")) == ("dtod (local)", "ptop (peer)")
    assert local.patches[0].get_data().values.tolist() == [0, 5000 / 500]
    assert peer.patches[0].get_data().values.tolist() == [700 / 500, 0]


def test_the_timeline_shows_each_lane():
    (axes,) = timeline_figure(TRACE).axes
    bars = [[path.get_extents() for path in lane.get_paths()] for lane in axes.collections]
    found = [[(round(b.x0 * 1e6), round(b.x1 * 1e6)) for b in lane] for lane in bars]
    assert found == [[(0, 400), (900, 1000)], [(300, 600)], [(100, 200), (600, 700)]]


def test_the_waterfall_ends_where_run_b_does():
    other = compute_facts(make(kernels=[(GEMM, 0, 700)], ranges=[("step 1", 0, 9)]))
    (axes,) = waterfall_figure(compare_facts(FACTS, other), rows=2).axes
    bars = axes.patches
    assert (bars[0].get_width(), bars[-1].get_width()) == (0.001, 0.0007)
    level = bars[0].get_width() + sum(bar.get_width() for bar in bars[1:-1])
    assert level == pytest.approx(0.0007)
    assert axes.get_yticklabels()[-2].get_text() == "everything else"


def test_the_same_facts_give_the_same_files(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths = draw_facts(FACTS, TRACE, tmp_path / folder)
        paths.append(draw_waterfall(compare_facts(FACTS, FACTS), tmp_path / folder))
        assert [p.name for p in paths] == ["shares.svg", "phases.svg", "timeline.svg", "copies.svg", "waterfall.svg"]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_no_device_work_draws_nothing(tmp_path):
    nothing = make()
    assert draw_facts(compute_facts(nothing), nothing, tmp_path) == []
