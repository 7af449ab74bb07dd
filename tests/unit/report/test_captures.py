"""Facts of captures as the report reads them: milliseconds per step that add up, and a figure that shows them."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tunemap.errors import UserError
from tunemap.report.captures import read_captures
from tunemap.report.scene import Scene
from tunemap.report.step_figure import draw_step
from tunemap.report.timeline_figure import draw_timeline

PHASES = """process,pid,device,phase,category,count,time_ns,wall_ns
0,1,cpu,forward,gemm,4,5000000,4000000
0,1,cpu,backward,gemm,4,6000000,6000000
0,1,cpu,backward,elementwise,2,2000000,2000000
"""
KERNELS = """process,pid,device,name,short_name,category,count,time_ns,wall_ns
0,1,cpu,aten::mm,mm,gemm,8,11000000,10000000
0,1,cpu,aten::add,add,elementwise,2,2000000,2000000
"""
TIMELINE = """process,rank,device,lane,name,start_ns,end_ns,time_ns
0,,cpu,step,1,0,8000000,6000000
0,,cpu,phase,forward,0,3000000,3000000
0,,cpu,phase,backward,3000000,8000000,5000000
0,,cpu,work,gemm,0,6000000,5500000
0,,cpu,work,rare,6000000,6500000,400000
0,,cpu,operator,mm,0,6000000,5000000
0,,cpu,communication,allreduce,6500000,7000000,500000
0,,cpu,gap,backward,7000000,8000000,1000000
"""


def write_facts(folder: Path, *, steps: int = 2, devices: int = 1) -> None:
    folder.mkdir(parents=True)
    (folder / "phases.csv").write_text(PHASES)
    (folder / "kernels.csv").write_text(KERNELS)
    (folder / "timeline.csv").write_text(TIMELINE)
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


def scene_of(captures):
    return Scene("methods", [], pd.DataFrame(), pd.DataFrame(), {}, captures)


def test_the_timeline_has_a_panel_per_capture_and_a_lane_for_what_occurs(tmp_path):
    write_facts(tmp_path / "a")
    write_facts(tmp_path / "b")
    with_copies = TIMELINE + "0,,cpu,copy,copy,0,1000000,1000000\n"
    (tmp_path / "b" / "timeline.csv").write_text(with_copies)
    figure, caption, alt = draw_timeline(scene_of(read_captures(tmp_path, {"a": "full", "b": "lora"})))
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["full", "lora"]
    lanes = [label.get_text() for label in first.get_yticklabels()]
    assert lanes == ["phase", "operators", "mm", "communication", "idle"]
    assert [label.get_text() for label in second.get_yticklabels()] == [*lanes[:4], "copies", "idle"]
    bars = [path.get_extents() for path in first.collections[-1].get_paths()]
    assert [(bar.x0, bar.x1) for bar in bars] == [(7.0, 8.0)]  # the gap
    assert [text.get_text() for text in first.texts] == ["forward", "backward"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gemm", "other categories"]
    words = "full: 8.0 ms, 25% idle; longest mm 5 ms; allreduce 0.5 ms; longest gap 1 ms in backward, at 7.0 ms."
    assert words in caption
    assert words in alt


def test_devices_that_do_not_fit_are_counted(tmp_path):
    write_facts(tmp_path / "a")
    head, *rows = TIMELINE.splitlines()
    many = [f"{process}{row[1:]}" for process in range(10) for row in rows]
    (tmp_path / "a" / "timeline.csv").write_text("\n".join([head, *many]) + "\n")
    figure, caption, _ = draw_timeline(scene_of(read_captures(tmp_path, {"a": "ddp"})))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"ddp, device {device}" for device in range(8)]
    assert caption.endswith("2 more devices are not drawn.")


def test_a_capture_that_names_no_step_has_no_timeline(tmp_path):
    write_facts(tmp_path / "a")
    (tmp_path / "a" / "timeline.csv").write_text(TIMELINE.splitlines()[0] + "\n")
    assert draw_timeline(scene_of(read_captures(tmp_path, {"a": "full"}))) is None


def test_facts_without_a_timeline_are_named(tmp_path):
    write_facts(tmp_path / "a")
    (tmp_path / "a" / "timeline.csv").unlink()
    with pytest.raises(UserError, match=r"timeline.csv: no such file; remove .*, and the workflow reads its capture"):
        read_captures(tmp_path, {"a": "full"})
