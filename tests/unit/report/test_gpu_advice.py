"""Which point of a study the report recommends for a GPU."""

import json

import pytest

from tests.unit.report.fake_results import plan as fake_plan
from tunemap.report.gpu_advice import COLUMNS, advise_on_gpus
from tunemap.report.scene import point_runs

GIB = 1 << 30
SMALL, LARGE = ("small-gpu", 8), ("large-gpu", 80)
# point of the method -> GiB, seconds of a step at best, accuracy
PLANNED = {"full": (20, 0.2, 0.90), "lora": (7, 0.1, 0.80), "qlora": (5, 0.4, 0.85)}


@pytest.fixture
def study(tmp_path):
    """Plan, its first experiment, that one's points, and a folder with predictions."""
    plan = fake_plan(1, (8,))
    experiment = plan["experiments"][0]
    points, predictions = [], {}
    for point, (run, *_) in point_runs(plan, experiment).items():
        planned = PLANNED.get(plan["runs"][run]["method"]["kind"])
        if planned is None:
            continue
        gib, seconds, accuracy = planned
        points.append({"point": point, "accuracy": accuracy, "accuracy_low": accuracy - 0.01,
                       "accuracy_high": accuracy + 0.01})  # fmt: skip
        predictions[run] = {
            "on_gpus": [
                {"device": name, "memory_bytes": room * GIB, "device_peak_bytes": gib * GIB,
                 "verdict": "cannot" if gib > room else "tight" if gib > 0.8 * room else "fits",
                 "step_seconds_low": seconds, "step_seconds_high": 4 * seconds, "tokens_per_step": 1000.0}
                for name, room in (SMALL, LARGE)
            ]
        }  # fmt: skip
    (tmp_path / "predictions.json").write_text(json.dumps(predictions))
    return plan, experiment, points, tmp_path


def cells(study) -> dict[str, dict[str, str]]:
    table = advise_on_gpus(*study)
    assert table is not None
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in table.rows}


def test_a_small_gpu_gets_what_fits_it(study):
    small = cells(study)["small-gpu"]
    assert small["Fit"].startswith("2 of") or int(small["Fit"].split()[0]) < int(small["Fit"].split()[2])
    assert small["Fastest that fits, tokens/s"].startswith("lora")
    assert "(tight)" in small["Fastest that fits, tokens/s"]
    assert "2,500 – 10,000" in small["Fastest that fits, tokens/s"]
    assert small["Most accurate that fits"].startswith("qlora")
    assert "85.0 % (84.0 to 86.0)" in small["Most accurate that fits"]


def test_a_large_gpu_gets_the_best_of_all(study):
    large = cells(study)["large-gpu"]
    assert large["Most accurate that fits"].startswith("full")
    assert large["Least memory, GiB"].endswith(": 5.0")


def test_points_that_were_not_measured_are_not_called_accurate(study):
    plan, experiment, _, folder = study
    table = advise_on_gpus(plan, experiment, [], folder)
    assert {row[4] for row in table.rows} == {"—"}


def test_a_study_without_predictions_has_no_such_table(study, tmp_path):
    plan, experiment, points, _ = study
    assert advise_on_gpus(plan, experiment, points, tmp_path / "nowhere") is None
