"""The roofline figure: kernels taken together, the roof of the data sheet, and what is said where something lacks."""

import json

import pandas as pd
import pytest
from matplotlib.collections import PathCollection

from tunemap.report.roofline_figure import draw_roofline
from tunemap.report.rooflines import read_rooflines
from tunemap.report.scene import Scene

ROWS = """report,id,name,short_name,category,time_ns,bytes,flops,flops_counted,flops_per_byte,flops_per_s
k.csv,0,gemm(),gemm,gemm,3000,1000,4000000,tensor,4000,1
k.csv,1,gemm(),gemm,gemm,3000,1000,4000000,tensor,4000,1
k.csv,2,add(),add,elementwise,2000,8000,4000,scalar,0.5,1
k.csv,3,copy(),copy,elementwise,2000,8000,,,,
"""
ROOF = {"device_name": "a GPU", "bandwidth_bytes_per_s": 4e12, "peak_flops_per_s": 1e15}


def drawn(tmp_path, **roofs):
    for run, roof in roofs.items():
        (tmp_path / run).mkdir()
        (tmp_path / run / "roofline.csv").write_text(ROWS)
        (tmp_path / run / "roofline.json").write_text(json.dumps(roof))
    found = read_rooflines(tmp_path, {run: f"point {run}" for run in [*roofs, "without"]})
    scene = Scene("methods", [], pd.DataFrame(), pd.DataFrame(), {}, [], rooflines=found)
    return found, draw_roofline(scene)


def test_launches_of_a_kernel_are_one_point_below_the_roof(tmp_path):
    (one,), (figure, caption, alt) = drawn(tmp_path, a=ROOF)
    assert one.kernels.set_index("short_name")[["launches", "time_ns", "bytes", "flops"]].to_dict("index") == {
        "gemm": {"launches": 2, "time_ns": 6000, "bytes": 2000, "flops": 8_000_000},
        "add": {"launches": 1, "time_ns": 2000, "bytes": 8000, "flops": 4000},
    }
    assert one.time_share == pytest.approx(0.8)  # the copy counts no FLOPs
    (axes,) = figure.axes
    (discs,) = [artist for artist in axes.collections if isinstance(artist, PathCollection)]
    assert discs.get_offsets().data.tolist() == [[4000, pytest.approx(8e6 / 6e-6)], [0.5, pytest.approx(2e9)]]
    assert discs.get_sizes()[0] == pytest.approx(3 * discs.get_sizes()[1])
    (roof,) = axes.lines
    assert list(zip(*roof.get_data(), strict=True)) == [(0.25, 1e12), (250, 1e15), (8000, 1e15)]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "1  gemm\n2  add"]
    words = (
        "point a: 2 kernels with 80% of the measured time (the others count no FLOPs); longest gemm (gemm), 75% of that"
    )
    assert words in caption
    assert words in alt
    assert "25% of that time left of the ridge, bound by memory" in caption


def test_a_device_without_a_data_sheet_has_no_roof(tmp_path):
    unknown = {"device_name": "a new GPU", "bandwidth_bytes_per_s": None, "peak_flops_per_s": None}
    _, (figure, caption, _) = drawn(tmp_path, a=ROOF, b=unknown)
    assert [len(axes.lines) for axes in figure.axes] == [1, 0]
    assert "no data sheet of a new GPU here, so no roof" in caption


def test_without_measured_kernels_there_is_no_figure(tmp_path):
    assert drawn(tmp_path) == ([], None)
