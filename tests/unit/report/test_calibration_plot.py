"""The drawing of predicted against measured peaks."""

import re
import xml.etree.ElementTree as ET

import pytest

from tunemap.report.calibration_plot import SIDE, calibration_plot

MIB = 1 << 20


def circles(svg: str) -> dict[str, ET.Element]:
    root = ET.fromstring(svg)
    found = root.iter("{http://www.w3.org/2000/svg}circle")
    return {re.match("[^:]+", one[0].text or "").group(): one for one in found}


def write(path, rows):
    lines = ["study,run,predicted_peak_bytes,measured_peak_bytes", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines))
    return path


def test_equal_peaks_lie_on_the_diagonal_and_others_on_their_side(tmp_path):
    path = write(tmp_path / "c.csv", [("s", "even", 100 * MIB, 100 * MIB), ("s", "over", 90 * MIB, 30 * MIB),
                                      ("s", "under", 30 * MIB, 90 * MIB), ("s", "failed", 5, "")])  # fmt: skip
    found = circles(calibration_plot(path, "s"))
    above = {run: SIDE - float(one.get("cy")) - float(one.get("cx")) for run, one in found.items()}
    assert above["even"] == pytest.approx(0, abs=0.2)
    assert above["over"] == pytest.approx(-above["under"], abs=0.3)
    assert above["over"] > 50
    assert found["over"][0].text == "over: predicted 90 MiB, measured 30 MiB"
    assert len(found) == 3


def test_the_runs_of_the_study_are_filled_and_not_those_of_others_with_the_same_id(tmp_path):
    rows = [("s", "a", 1 * MIB, 2 * MIB), ("other", "a", 2 * MIB, 2 * MIB), ("other", "b", 3 * MIB, 2 * MIB)]
    found = circles(calibration_plot(write(tmp_path / "c.csv", rows), "s"))
    fills = {name: one.get("fill") for name, one in found.items()}
    assert fills == {"a": "currentColor", "a of other": "none", "b of other": "none"}


def test_names_are_escaped(tmp_path):
    svg = calibration_plot(write(tmp_path / "c.csv", [("s", "<b>&", 1 * MIB, 2 * MIB)]), "s")
    assert set(circles(svg)) == {"<b>&"}


def test_nothing_measured_draws_nothing(tmp_path):
    assert calibration_plot(tmp_path / "absent", "s") is None
    assert calibration_plot(write(tmp_path / "c.csv", [("s", "a", 5, "")]), "s") is None
