"""Golden values of GoRA's released code; the folder of helpers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def golden_folder(shared_data) -> Path:
    folder = shared_data.parent / "reference" / "gora"
    if not folder.is_dir():
        pytest.skip(f"no golden values of GoRA in {folder}")
    return folder


@pytest.fixture(scope="module")
def golden(golden_folder) -> dict:
    return json.loads((golden_folder / "golden.json").read_text())


@pytest.fixture(scope="module")
def golden_shapes(golden) -> dict[str, tuple[int, int]]:
    return {name: tuple(shape) for name, shape in golden["shapes"].items()}


@pytest.fixture(scope="module")
def golden_inputs(golden_folder, golden_shapes) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(W, mean of the four gradients) per module."""
    with np.load(golden_folder / "synthetic_inputs.npz") as arrays:
        return {
            name: (
                torch.from_numpy(arrays[f"W/{name}"]),
                torch.stack([torch.from_numpy(arrays[f"G{t}/{name}"]) for t in range(4)]).mean(0),
            )
            for name in golden_shapes
        }
