"""Models: where they come from (hub, local folder, random weights, tiny pretrained here) and how a run loads them.

Every source is prepared once into a folder of the same layout, so that nothing downstream knows where a model
came from. Importing this package is cheap; `tunemap.models.loading` imports torch and transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunemap.config import HubModel, LocalModel, ModelConfig, RandomModel
from tunemap.startup import quick_imports


def prepare(
    model: ModelConfig, destination: Path, *, data_root: Path | None = None, show_progress: bool = False
) -> None:
    """Write the model to `destination` in hub layout, with its manifest model.json (see `tunemap.models.folder`).

    Relative paths start at `data_root`, or at the working directory. The folder is whole or absent, and whatever
    was there before is replaced.

    Raises:
        UserError: a path, download, override or pretraining that does not work out, with what to do about it.
    """
    with quick_imports():
        from tunemap.models.describe import describe
    from tunemap.models.folder import build_folder, write_manifest

    with build_folder(destination) as folder:
        facts = _fill(model, folder, data_root or Path(), show_progress)
        write_manifest(folder, {"source": model.model_dump(mode="json")} | describe(folder) | facts)


def _fill(model: ModelConfig, folder: Path, data_root: Path, show_progress: bool) -> dict[str, Any]:
    """Write the files of the model; returns what only its source knows about it."""
    if isinstance(model, HubModel):
        from tunemap.models.hub import download

        return download(model, folder, show_progress=show_progress)
    if isinstance(model, LocalModel):
        from tunemap.models.local import take

        return take(data_root / Path(model.path).expanduser(), folder)
    if isinstance(model, RandomModel):
        from tunemap.models.random import draw

        return draw(model, folder, data_root=data_root)
    from tunemap.models.tiny import make

    return make(model, folder, show_progress=show_progress)
