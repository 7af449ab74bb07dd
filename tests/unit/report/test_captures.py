"""Facts of captures as the report reads them: milliseconds per step that add up, and a figure that shows them."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tunemap.errors import UserError
from tunemap.report.captures import read_captures
from tunemap.report.scene import Scene
from tunemap.report.step_figure import draw_step

PHASES = """process,pid,device,phase,category,count,time_ns,wall_ns
0,1,cpu,forward,gemm,4,5000000,4000000
0,1,cpu,backward,gemm,4,6000000,6000000
0,1,cpu,backward,elementwise,2,2000000,2000000
"""
KERNELS = """process,pid,device,name,short_name,category,count,time_ns,wall_ns
0,1,cpu,aten::mm,mm,gemm,8,11000000,10000000
0,1,cpu,aten::add,add,elementwise,2,2000000,2000000
"""


def write_facts(folder: Path, *, steps: int = 2, devices: int = 1) -> None:
    folder.mkdir(parents=True)
    (folder / "phases.csv").write_text(PHASES)
    (folder / "kernels.csv").write_text(KERNELS)
    (folder / "summary.json").write_text(json.dumps({"devices": [{"idle_ns": 3000000}] * devices}))
    described = {"outcome": "ok", "steps": steps, "profiled_to_unprofiled_ratio": 1.2}
    (folder / "capture.json").write_text(json.dumps(described))


def test_times_are_per_step(tmp_path):
    write_facts(tmp_path / "a")
    (capture,) = read_captures(tmp_path, {"a": "lora"})
    assert capture.wall_ms == {("forward", "gemm"): 2.0, ("backward", "gemm"): 3.0, ("backward", "elementwise"): 1.0}
    assert capture.idle_ms == 1.5
    assert capture.categories == {"gemm": 5.0, "elementwise": 1.0}


def test_longest_operators_are_shares_of_the_busy_time(tmp_path):
    write_facts(tmp_path / "a")
    (capture,) = read_captures(tmp_path, {"a": "lora"})
    assert dict(capture.operators) == pytest.approx({"mm": 10 / 12, "add": 2 / 12})


def test_times_of_several_devices_are_their_mean(tmp_path):
    write_facts(tmp_path / "a", devices=2)
    (capture,) = read_captures(tmp_path, {"a": "lora"})
    assert capture.idle_ms == 1.5
    assert capture.wall_ms["forward", "gemm"] == 1.0


def test_failed_captures_are_left_out(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "capture.json").write_text('{"outcome": "error"}')
    assert read_captures(tmp_path, {"a": "lora", "b": "full"}) == []


def test_the_figure_of_a_step_shows_phases_and_says_what_the_profiler_cost(tmp_path):
    write_facts(tmp_path / "a")
    write_facts(tmp_path / "b")
    captures = read_captures(tmp_path, {"a": "full", "b": "lora"})
    figure, caption, alt = draw_step(Scene("methods", [], pd.DataFrame(), pd.DataFrame(), {}, captures))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["full", "lora"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["forward", "backward", "idle"]
    assert "full 1.20, lora 1.20" in caption
    assert "mm 83%" in caption
    assert "full: forward 2.0, backward 4.0" in alt


def test_without_captures_there_is_no_figure_of_a_step():
    assert draw_step(Scene("methods", [], pd.DataFrame(), pd.DataFrame(), {}, [])) is None


def test_a_capture_without_work_is_named(tmp_path):
    write_facts(tmp_path / "a", devices=0)
    with pytest.raises(UserError, match="saw no device at work"):
        read_captures(tmp_path, {"a": "lora"})
