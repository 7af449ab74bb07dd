"""`tunemap data-stats`: the figures on the command line, for folders and for single files."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunemap.data.command import add_data_stats_arguments, run_data_stats, template_text
from tunemap.errors import UserError

FOUR_SHOT = Path(__file__).parent / "four_shot.txt"


def stats(capsys: Any, *arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_data_stats_arguments(parser)
    assert run_data_stats(parser.parse_args([*arguments, "--json"])) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    path.write_text("text,stars\nthe film was good,5\na bad film overall,1\nwhat a dull plot,1\n")
    return path


def test_gsm8k_with_four_worked_examples_at_256_has_no_labels(capsys: Any, shared_data: Path, tmp_path: Path) -> None:
    for split, rows in (("train", 300), ("test", 50)):
        lines = (shared_data / "gsm8k" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{split}.jsonl").write_text("".join(lines[:rows]))
    found = stats(
        capsys, "--task", "gsm8k", "--path", str(tmp_path), "--max-length", "256",
        "--tokenizer", str(shared_data / "qwen2.5-tokenizer"), "--template", str(FOUR_SHOT),
    )  # fmt: skip
    assert found["examples_without_label_tokens"] == found["rows"] == 300
    assert found["truncated_answer_share"] == found["truncated_prompt_share"] == 1
    assert found["label_tokens_kept_share"] == 0
    assert found["test"]["rows"] == 50
    assert {gate["gate"]: gate["passed"] for gate in found["gates"]} == {"labels": False, "truncation": False}


def test_a_single_file_with_a_field_mapping(capsys: Any, reviews: Path, sentiment_folder: Path) -> None:
    found = stats(
        capsys, "--task", "classification", "--path", str(reviews), "--tokenizer", str(sentiment_folder),
        "--max-length", "5", "--prompt-field", "text", "--answer-field", "stars", "--per-device-batch-size", "3",
    )  # fmt: skip
    assert found["rows"] == 3
    assert found["truncated_prompt_share"] == 1
    assert found["examples_without_label_tokens"] == 0
    assert found["padding_waste_share"] == 0
    assert found["packing_efficiency"] is None
    assert "test" not in found


@pytest.mark.parametrize("batching", ["longest", "fixed_length", "packed"])
def test_the_requested_batching_is_the_one_reported(
    capsys: Any, tmp_path: Path, arithmetic_folder: Path, batching: str
) -> None:
    rows = [{"ask": f"What is {'one plus ' * i}one?", "reply": str(i)} for i in range(1, 20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = stats(
        capsys, "--task", "generation", "--path", str(path), "--tokenizer", str(arithmetic_folder),
        "--max-length", "400", "--prompt-field", "ask", "--answer-field", "reply", "--batching", batching,
    )  # fmt: skip
    assert found["batching"] == batching
    assert found["padding_waste_share"] == found["padding_waste_share_by_batching"][batching]
    assert len(set(found["padding_waste_share_by_batching"].values())) == 4


def test_the_table_shows_failed_gates(capsys: Any, reviews: Path, sentiment_folder: Path) -> None:
    parser = argparse.ArgumentParser()
    add_data_stats_arguments(parser)
    run_data_stats(
        parser.parse_args([
            "--task", "classification", "--path", str(reviews), "--tokenizer", str(sentiment_folder),
            "--max-length", "5", "--prompt-field", "text", "--answer-field", "stars",
        ])
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "truncated_prompt_share" in out
    assert "100.00%" in out
    assert "passed  labels" in out
    assert "FAILED  truncation" in out


def test_torch_is_not_imported(reviews: Path, sentiment_folder: Path) -> None:
    program = (
        "import argparse, sys; from tunemap.data.command import *\n"
        "p = argparse.ArgumentParser(); add_data_stats_arguments(p)\n"
        f"run_data_stats(p.parse_args(['--task', 'classification', '--path', {str(reviews)!r}, '--tokenizer', "
        f"{str(sentiment_folder)!r}, '--max-length', '9', '--prompt-field', 'text', '--answer-field', 'stars']))\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_mistakes_are_named(capsys: Any, reviews: Path, sentiment_folder: Path) -> None:
    common = ["--task", "gsm8k", "--tokenizer", str(sentiment_folder), "--max-length", "9"]
    with pytest.raises(UserError, match="--path nowhere: no such file or folder"):
        stats(capsys, *common, "--path", "nowhere")
    with pytest.raises(UserError, match="no field 'question'; it has text, stars"):
        stats(capsys, *common, "--path", str(reviews))
    with pytest.raises(UserError, match=r"neither a file nor a text with \{prompt\}"):
        template_text("absent.txt")
    with pytest.raises(SystemExit):
        stats(capsys, *common[:-1], "0", "--path", str(reviews))
    assert "0: expected a whole number above 0" in capsys.readouterr().err
