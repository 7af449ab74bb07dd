"""Source `random`: any architecture with seeded random weights, as speed and memory do not depend on their values."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tunemap.config import RandomModel
from tunemap.data.tokenizers import load_tokenizer, resolve_tokenizer
from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.models.describe import check_vocabulary, model_class
from tunemap.models.loading import brief, build_config, config_file, explained, quiet


def draw(model: RandomModel, folder: Path, *, data_root: Path) -> dict[str, Any]:
    """Write the tokenizer, and weights of the architecture drawn from the seed in the dtype that its config names."""
    source = data_root / Path(model.config).expanduser()
    tokenizer_source = data_root / Path(model.tokenizer).expanduser()
    resolve_tokenizer(tokenizer_source, folder)
    tokenizer = load_tokenizer(folder)
    config = overridden_config(config_file(source), model.overrides)
    check_vocabulary(len(tokenizer), config.vocab_size, config_file(source), tokenizer_source)
    # The config may come from another family than the tokenizer: generation stops at the tokenizer's token.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    network = _draw(config, config_file(source), model.seed)
    with quiet():
        network.save_pretrained(folder)
    return {}


def overridden_config(file: Path, overrides: dict[str, Any]) -> PreTrainedConfig:
    """The architecture of a config.json with some keys changed; an unknown key is answered with the nearest one."""
    settings = read_json(file)
    plain = build_config(settings, file)
    aliases = plain.attribute_map  # such as num_hidden_layers for the n_layers of DistilBERT
    known = sorted({*settings, *plain.to_dict(), *aliases})
    for key, value in overrides.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"overrides: {file} has no key {key}; the nearest is {nearest}")
        settings[aliases.get(key, key)] = value
    if len(settings.get("layer_types") or ()) != settings.get("num_hidden_layers"):
        settings.pop("layer_types", None)  # one entry per layer, which transformers fills in by itself
    return build_config(settings, file)


def _draw(config: PreTrainedConfig, file: Path, seed: int) -> PreTrainedModel:
    with quiet(), explained(file), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = model_class(config, file)._from_config(config, dtype=config.dtype or torch.float32).eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, 4, dtype=torch.long))
    except RuntimeError as error:
        raise UserError(f"{file} with these overrides makes a model that cannot run: {brief(error)}") from error
    return network
