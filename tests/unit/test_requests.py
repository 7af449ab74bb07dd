"""What jobs ask for: from the prediction where there is one, by rules of thumb elsewhere, more after a failure."""

import pytest

from tests.unit.training.conftest import make_run
from tunemap import requests
from tunemap.planner.prediction import Prediction

GIB = 1 << 30


def _predicted(**values) -> Prediction:
    return Prediction("tiny", "H200", **values)


def test_cores_are_those_of_a_node():
    run = make_run({"kind": "full"}, strategy="ddp", gpus=8, nodes=2, threads_per_process=3)
    assert requests.gpus_per_node(run) == 4
    assert requests.node_cpus(run, device="cpu") == 12
    assert requests.node_cpus(run, device="auto") == 16


def _memory(run, *, device="cuda", model_bytes=GIB, predicted=None, attempt=1) -> int:
    return requests.training_memory_mb(
        run, device=device, model_bytes=model_bytes, predicted=predicted, attempt=attempt
    )


def test_memory_grows_with_processes_of_a_node_model_and_attempt():
    one = make_run({"kind": "full"})
    two = make_run({"kind": "full"}, strategy="ddp", gpus=2)
    spread = make_run({"kind": "full"}, strategy="ddp", gpus=2, nodes=2)
    assert _memory(one) < _memory(two)
    assert _memory(spread) == _memory(one)
    assert _memory(one) < _memory(one, device="cpu")
    assert _memory(one) < _memory(one, model_bytes=2 * GIB)
    assert _memory(one, model_bytes=None) == _memory(one, model_bytes=requests.UNKNOWN_MODEL_BYTES)
    assert _memory(one, attempt=2) == pytest.approx(2 * _memory(one), abs=1)


def test_a_prediction_replaces_the_rule_of_thumb_for_training_but_not_for_loading():
    run = make_run({"kind": "full"})
    large, small = _predicted(host_peak_bytes=40 * GIB), _predicted(host_peak_bytes=1)
    base_mb = (requests.JOB_BYTES + requests.PROCESS_BYTES) / 1e6
    assert _memory(run, device="cpu", predicted=large) == pytest.approx(base_mb + 60 * GIB / 1e6, abs=1)
    assert _memory(run, device="cpu", predicted=small) == pytest.approx(base_mb + 3 * GIB / 1e6, abs=1)


def test_time_is_predicted_times_safety_times_attempt():
    run = make_run({"kind": "full"})
    predicted = _predicted(seconds_low=600.0, seconds_high=1200.0)
    assert requests.training_minutes(run, predicted=predicted, attempt=1) == 30 + requests.LOAD_MINUTES
    assert requests.training_minutes(run, predicted=predicted, attempt=2) == 2 * (30 + requests.LOAD_MINUTES)
    unknown = requests.UNKNOWN_TRAINING_MINUTES + requests.LOAD_MINUTES
    assert requests.training_minutes(run, predicted=None, attempt=1) == unknown


def test_no_more_time_is_asked_for_than_the_run_may_take():
    run = make_run({"kind": "full"}, time_limit_minutes=4.5)
    assert requests.training_minutes(run, predicted=None, attempt=1) == 25  # whole minutes, rounded up


def _evaluation(run, *, device="cuda", model_bytes=None, attempt=1) -> int:
    return requests.evaluation_minutes(run, device=device, model_bytes=model_bytes, attempt=attempt)


def test_time_of_an_evaluation_grows_with_batches_answers_and_attempt():
    rows = make_run({"kind": "full"}).dataset.test_rows
    slow = {"evaluation_batch_size": 1, "max_new_tokens": 10_000}
    one = make_run({"kind": "full"}, **slow)
    minutes = requests.SAFETY * rows * 10_000 * requests.PASS_SECONDS / 60 + requests.LOAD_MINUTES
    assert _evaluation(one) == pytest.approx(minutes, abs=1)
    assert _evaluation(one, attempt=2) == pytest.approx(2 * minutes, abs=1)
    assert _evaluation(make_run({"kind": "full"}, strategy="ddp", gpus=2, **slow)) < _evaluation(one)
    assert _evaluation(make_run({"kind": "full"})) == requests.SHORT_JOB_MINUTES
    assert _evaluation(make_run({"kind": "full"}), attempt=2) == 2 * requests.SHORT_JOB_MINUTES


def test_a_cpu_gets_more_time_to_evaluate_a_larger_model():
    run = make_run({"kind": "full"}, max_new_tokens=500)
    assert _evaluation(run, model_bytes=100 * GIB) == _evaluation(run)
    assert _evaluation(run, device="cpu") == _evaluation(run)  # before the model is prepared
    assert _evaluation(run, device="cpu", model_bytes=100 * GIB) > _evaluation(run)


def test_time_to_measure_inference_grows_with_the_attempt():
    assert requests.inference_minutes(attempt=2) == 2 * requests.inference_minutes(attempt=1)


def test_the_size_of_a_model_is_known_once_it_is_prepared(tmp_path):
    assert requests.prepared_bytes(tmp_path / "missing") is None
    for name, size in (("model-1.safetensors", 10), ("model-2.safetensors", 5), ("config.json", 99)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert requests.prepared_bytes(tmp_path) == 15
