"""Mistakes of published studies, made on purpose on real data: the run ends as invalid and says why."""

import json
from pathlib import Path

import pytest

from .conftest import make_checkout

FOUR_SHOT = Path(__file__).parent.parent / "unit" / "data" / "four_shot.txt"
RUN = "qwen2.gsm8k.full.seed-0"


@pytest.fixture(scope="module")
def refused(repository, shared_data, tmp_path_factory):
    """The study that trains GSM8K with the published 4-shot template at 256 tokens, run by Snakemake."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    study = {
        "study": "refused",
        "data_root": str(shared_data),
        "models": {
            "qwen2": {
                "source": "random",
                "config": "qwen2.5-configs/Qwen2.5-1.5B-Instruct",
                "tokenizer": "qwen2.5-tokenizer",
                "overrides": small | {"num_key_value_heads": 2, "max_window_layers": 2},
            }
        },
        "prompt_templates": {"four_shot": FOUR_SHOT.read_text()},
        "datasets": {
            "gsm8k": {
                "task": "gsm8k",
                "source": "local",
                "path": "gsm8k",
                "train_rows": 64,
                "test_rows": 8,
                "prompt_template": "four_shot",
            }
        },
        "methods": {"full": {"kind": "full"}},
        "defaults": {"model": "qwen2", "dataset": "gsm8k", "max_length": 256, "max_new_tokens": 4},
        "experiments": [{"name": "published", "question": "Does it train?", "fixed": {"method": "full"}}],
    }
    checkout = make_checkout(repository, tmp_path_factory.mktemp("refused") / "checkout", study)
    done = checkout.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout.root / "results" / "refused"


def test_training_without_label_tokens_is_invalid(refused):
    outcome = json.loads((refused / "runs" / RUN / "outcome.json").read_text())
    assert outcome["outcome"] == "invalid"
    assert "64 of 64 training examples (100.00%) have no label token at max_length 256" in outcome["reason"]


def test_an_invalid_run_is_a_row_and_not_evaluated(refused):
    evaluation = json.loads((refused / "evaluations" / RUN / "evaluation.json").read_text())
    assert (evaluation["outcome"], evaluation["reason"]) == ("skipped", "the training ended with outcome invalid")
    _, *rows = (refused / "tables" / "runs.csv").read_text().splitlines()
    row = next(row for row in rows if row.startswith(RUN))
    assert ",invalid," in row
    assert "invalid" in (refused / "report.html").read_text()
