"""Evaluates a run into its two files, which also say why a run could not be evaluated; imports torch only if needed."""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunemap.files import read_json, write_atomic, write_json
from tunemap.run import Run
from tunemap.training.devices import lease_devices


def evaluate_to_files(
    run: Run,
    *,
    device: str,
    model: Path,
    tokens: Path,
    outcome: Path,
    weights: Path,
    evaluation: Path,
    predictions: Path,
) -> None:
    """Evaluate and write evaluation.json and predictions.jsonl; a failure is written there too, with its reason."""
    trained = read_json(outcome)
    result: dict[str, Any] = {
        "run": run.id,
        "digest": run.evaluation_digest,
        "training_digest": run.training_digest,
        "outcome": "ok",
        "reason": None,
    }
    rows: list[dict[str, Any]] = []
    if trained["digest"] != run.training_digest:
        result |= {"outcome": "error", "reason": f"{outcome} is of another configuration: train the run again"}
    elif trained["outcome"] != "ok":
        result |= {"outcome": "skipped", "reason": f"the training ended with outcome {trained['outcome']}"}
    else:
        try:
            with lease_devices(device, 1) as devices:
                from tunemap.evaluate import evaluate

                summary, made = evaluate(run, model, weights, tokens, device=devices.kind)
            result |= summary
            rows = [asdict(prediction) for prediction in made]
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            result |= {"outcome": "error", "reason": reason, "traceback": traceback.format_exc()}
            print(result["traceback"], flush=True)
    write_atomic(predictions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(evaluation, result)
