"""The architecture of a run's model, from the prepared folder or from its source; needs no weights."""

from __future__ import annotations

import functools
from pathlib import Path

from transformers import PreTrainedConfig

from tunemap.config import LocalModel, ModelConfig, RandomModel, TinyModel
from tunemap.errors import UserError
from tunemap.models.folder import CONFIG
from tunemap.models.loading import config_file, read_config
from tunemap.models.random import overridden_config
from tunemap.models.tiny import architecture


def architecture_of(model: ModelConfig, prepared: Path, data_root: Path) -> PreTrainedConfig:
    """The transformers config of a model; `prepared` is its folder of prepared weights, which need not exist.

    Raises UserError where only the hub knows it and the hub cannot be reached.
    """
    if (prepared / CONFIG).is_file():
        return read_config(prepared)
    if isinstance(model, TinyModel):
        return architecture(model.architecture)
    if isinstance(model, LocalModel):
        return read_config(data_root / Path(model.path).expanduser())
    if isinstance(model, RandomModel):
        return overridden_config(config_file(data_root / Path(model.config).expanduser()), model.overrides)
    return _of_hub(model.id, model.revision)


@functools.cache
def _of_hub(name: str, revision: str) -> PreTrainedConfig:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return read_config(Path(hf_hub_download(name, CONFIG, revision=revision)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{name} (revision {revision}): {CONFIG} is neither in the cache nor can the hub be reached; prepare the "
            "model first, or name a folder that holds one"
        ) from error
