"""Source `local`: a model folder in hub layout on this machine, checked and taken over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunemap.data.tokenizers import resolve_tokenizer
from tunemap.errors import UserError
from tunemap.models.folder import CONFIG, WEIGHTS_INDEX, bring, weight_files

OPTIONAL = ("generation_config.json", WEIGHTS_INDEX)


def take(source: Path, folder: Path) -> dict[str, Any]:
    """Copy the model in `source` to `folder`; weights beyond 64 MiB are linked, and their digest recorded.

    Raises:
        UserError: `source` is no folder, or lacks config.json, weights or a tokenizer; all that is missing is named.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such model folder; `path` of a local model starts at data_root")
    problems = []
    weights: list[Path] = []
    if not (source / CONFIG).is_file():
        problems.append(f"no {CONFIG}")
    try:
        weights = weight_files(source)
    except UserError as error:
        problems.append(str(error).removeprefix(f"{source}: ") + _other_format(source))
    try:
        resolve_tokenizer(source, folder)
    except UserError as error:
        problems.append(str(error).removeprefix(f"{source}: "))
    if problems:
        raise UserError(f"{source} is not a model in hub layout: {'; '.join(problems)}")
    for path in (source / CONFIG, *(source / name for name in OPTIONAL), *weights):
        if path.is_file():
            bring(path, folder)
    return {}


def _other_format(folder: Path) -> str:
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
    return f" ({', '.join(others)} must be converted: save_pretrained writes safetensors)" if others else ""
