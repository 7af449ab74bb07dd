"""What a model folder holds: the facts of its manifest, and the checks that need its config and tokenizer together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunemap.errors import UserError
from tunemap.models.folder import CONFIG, weight_files
from tunemap.models.loading import explained, load_tokenizer, quiet, read_config

PROBE = "Once, in 1984, a café sold 12 + 30 = 42 apples.\n#### 42"


def describe(folder: Path) -> dict[str, Any]:
    """Architecture, logical parameter count (tied weights once), dtype, vocabulary and context of a model folder.

    Raises:
        UserError: the tokenizer has more entries than the embedding has rows, or the weights are damaged.
    """
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    _check_tokenizer(folder, tokenizer)
    check_vocabulary(len(tokenizer), config.vocab_size, folder / CONFIG, folder)
    with quiet(), explained(folder), torch.device("meta"):
        model = model_class(config, folder / CONFIG)(config)
    return {
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": _stored_dtype(folder),
        "embedding_rows": config.vocab_size,
        "tokenizer_entries": len(tokenizer),
        "chat_template": tokenizer.chat_template is not None,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
    }


def check_vocabulary(entries: int, rows: int, config: Path, tokenizer: Path) -> None:
    """Refuse a tokenizer that can produce ids beyond the embedding: on a GPU that is an assertion without a name."""
    if entries > rows:
        raise UserError(
            f"tokenizer {tokenizer} has {entries} entries, but {config} has vocab_size {rows}; "
            f"choose the model's own tokenizer, or a vocab_size of at least {entries}"
        )


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that transformers does not read as its file says.

    For some model types, qwen2 among them, transformers 5 puts the tokenizer of the model type in place of the one
    that the folder declares, without a word.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    if tokenizer.encode(PROBE, add_special_tokens=False) != (
        Tokenizer.from_file(str(file)).encode(PROBE, add_special_tokens=False).ids
    ):
        raise UserError(
            f"{file}: transformers {transformers.__version__} reads it as a {type(tokenizer).__name__}, with other "
            "tokens than it defines; use the tokenizer of the model's own family"
        )


def model_class(config: PreTrainedConfig, file: Path) -> type[PreTrainedModel]:
    """The class that config.json names under `architectures`, else the language model of its model_type."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (AutoModelForCausalLM, AutoModelForMaskedLM):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise UserError(f"{file}: a {config.model_type} is no language model that transformers knows")


def _stored_dtype(folder: Path) -> str:
    """Dtypes of the stored weights, from the headers of the files, joined by commas."""
    from safetensors import SafetensorError, safe_open

    dtypes: set[str] = set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as weights:
                dtypes |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise UserError(f"{path}: damaged, perhaps a download that did not finish ({error})") from error
    return ", ".join(sorted(dtypes))
