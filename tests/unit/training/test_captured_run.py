"""A capture takes the first steps of a run: its end comes early, what its method plans by its length does not."""

import argparse
import json

from tunemap.capture import worker
from tunemap.files import read_json


def test_schedule_of_a_method_is_that_of_the_whole_run(prepared, make_run, tmp_path):
    parameters = {"init_r": 4, "target_r": 2, "tinit": 50, "tfinal": 300}
    run = make_run({"kind": "peft", "type": "ADALORA", "parameters": parameters}, max_steps=1000)
    (tmp_path / "run.json").write_text(json.dumps(run.training_spec()))
    arguments = argparse.Namespace(
        run_file=tmp_path / "run.json", model=prepared.model, tokens=prepared.tokens, folder=tmp_path,
        device="cpu", backend="ncu",
    )  # fmt: skip
    worker._capture(arguments)
    assert read_json(tmp_path / "capture.rank0.json")["steps"] == 1
