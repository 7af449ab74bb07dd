"""Loss curves: ranks joined, long ones thinned, damaged ones told in words."""

import pandas as pd
import pytest

from tunemap.loss_curves import LOSS_ROWS, read_curve


def test_losses_of_ranks_are_joined_by_their_label_tokens(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text(
        "rank,step,elapsed_s,loss,label_tokens\n0,1,1.0,2.0,10\n1,1,1.5,5.0,30\n0,2,2.0,1.0,10\n1,2,2.5,1.0,10\n"
    )
    curve, problem = read_curve(path)
    assert problem == ""
    assert {name: values.tolist() for name, values in curve.items()} == {
        "step": [1, 2],
        "elapsed_s": [1.5, 2.5],
        "loss": [4.25, 1.0],
    }


def test_a_long_curve_keeps_its_mean(tmp_path):
    path = tmp_path / "steps.csv"
    rows = pd.DataFrame({"rank": 0, "step": range(1, 1201), "elapsed_s": range(1, 1201), "label_tokens": 1})
    rows.assign(loss=rows["step"] * 0.5).to_csv(path, index=False)
    curve, _ = read_curve(path)
    assert len(curve["step"]) == LOSS_ROWS
    assert curve["loss"].mean() == pytest.approx(300.25)
    assert curve["step"][-1] == 1200


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no column rank"),
        ("rank,step,elapsed_s,loss\n0,1,1.0,2.0\n", "no column label_tokens"),
        ("rank,step,elapsed_s,loss,label_tokens\n0,1,1.0,2.0,10\n0,2,1.0\n", "line 3: list index out of range"),
        (
            "rank,step,elapsed_s,loss,label_tokens\n0,1,1.0,much,10\n",
            "line 2: could not convert string to float: 'much'",
        ),
        ("rank,step,elapsed_s,loss,label_tokens\n0,1,1.0,,10\n0,2,1.0,nan,10\n", "holds no loss"),
        ("rank,step,elapsed_s,loss,label_tokens\n", "holds no loss"),
        ("\0", "no column rank"),
    ],
)
def test_a_damaged_curve_is_a_problem_in_words(tmp_path, text, problem):
    path = tmp_path / "steps.csv"
    path.write_text(text)
    assert read_curve(path) == (None, f"{path}: {problem}")
