"""Find the local files that a model is made from; imports nothing heavy, because planning a workflow asks it."""

from __future__ import annotations

from pathlib import Path

from tunemap.config import LocalModel, ModelConfig, RandomModel
from tunemap.errors import UserError


def model_files(model: ModelConfig, data_root: Path) -> list[Path]:
    """Files that `prepare` reads for this model, in order; none for the hub and for tiny models.

    Raises UserError with the key and the path when one does not exist.
    """
    if isinstance(model, LocalModel):
        return _files(data_root / Path(model.path).expanduser(), "path")
    if isinstance(model, RandomModel):
        config = data_root / Path(model.config).expanduser()
        config = config / "config.json" if config.is_dir() else config
        if not config.is_file():
            raise UserError(f"config: {config}: no such file")
        return [config, *_files(data_root / Path(model.tokenizer).expanduser(), "tokenizer")]
    return []


def _files(folder: Path, key: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is no folder")
    return sorted(path for path in folder.iterdir() if path.is_file())
