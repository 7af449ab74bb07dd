"""What an edit reruns: exactly what depends on it, planned by real Snakemake."""

import copy as copies
import shutil

from .conftest import BASE, FULL, LORA

TABLES = {"predict", "tables", "figures", "database", "write_report"}


def test_a_finished_study_has_nothing_to_do(finished):
    assert finished.planned() == set()


def test_results_that_are_gone_are_made_again(copy):
    """As `tunemap retry` removes those of a run that failed, and as messages about damaged ones ask for."""
    shutil.rmtree(copy.results / "runs" / LORA)
    shutil.rmtree(copy.results / "evaluations" / LORA)
    shutil.rmtree(copy.results / "evaluations" / FULL)
    assert copy.planned() == {f"train {LORA}", f"evaluate {LORA}", f"evaluate {FULL}"} | TABLES - {"predict"}


def test_a_new_rank_plans_its_runs_and_the_report_alone(copy):
    study = copy.study()
    study["experiments"][1]["vary"]["method.rank"] = [4]
    copy.write_study(study)
    new = "small.arithmetic.lora.rank-4.seed-0"
    assert copy.planned() == {f"train {new}", f"evaluate {new}"} | TABLES


def test_a_new_seed_plans_its_runs_and_the_report_alone(copy):
    study = copy.study()
    study["experiments"][0]["seeds"] = [0, 1]
    copy.write_study(study)
    new = "small.arithmetic.full.seed-1"
    assert copy.planned() == {f"train {new}", f"evaluate {new}"} | TABLES


def test_a_method_edited_in_place_retrains_its_runs_alone(copy):
    study = copy.study()
    study["methods"]["lora"]["rank"] = 4
    study["experiments"][1]["vary"] = {"method": ["lora"]}
    del study["experiments"][1]["fixed"]
    copy.write_study(study)
    assert copy.planned() == {f"train {LORA}", f"evaluate {LORA}"} | TABLES


def test_a_removed_experiment_plans_the_report_alone(copy):
    study = copy.study()
    del study["experiments"][1]
    copy.write_study(study)
    assert copy.planned() == TABLES


def test_a_report_title_plans_the_report_alone(copy):
    copy.write_study(copy.study() | {"report": {"title": "Another title"}})
    assert copy.planned() == {"write_report"}


def test_an_evaluation_setting_does_not_retrain(copy):
    study = copy.study()
    study["defaults"]["max_new_tokens"] = 32
    copy.write_study(study)
    assert copy.planned() == {f"evaluate {run}" for run in (FULL, LORA, BASE)} | TABLES


def test_editing_the_trainer_retrains(copy):
    _append(copy, "src/tunemap/training/loop.py")
    planned = copy.planned()
    assert {f"train {run}" for run in (FULL, LORA)} <= planned
    assert not {job for job in planned if job.startswith(("prepare", "tokenize"))}


def test_editing_the_report_does_not_retrain(copy):
    _append(copy, "src/tunemap/report/page.py")
    assert copy.planned() == {"write_report"}


def test_touching_the_study_or_the_sources_reruns_nothing(copy):
    for path in (copy.study_file, copy.root / "src/tunemap/training/loop.py"):
        path.touch()
    assert copy.planned() == set()


def test_a_study_given_by_hand_replaces_the_default_study(copy):
    study = copies.deepcopy(copy.study())
    study["study"] = "other"
    copy.write_study(study)
    planned = copy.planned()
    assert f"train {FULL}" in planned
    assert not {job for job in planned if "tiny-qwen2" in job}


def _append(checkout, path: str) -> None:
    file = checkout.root / path
    file.write_text(file.read_text() + "\n# edited\n")
