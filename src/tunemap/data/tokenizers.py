"""Make a loadable tokenizer folder from what people have: a hub folder, a gzipped tokenizer.json, a vocab.txt."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunemap.errors import UserError
from tunemap.files import read_json, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
LARGEST_UNPACKED_BYTES = 2**29  # of a tokenizer.json.gz; the largest on the hub have a twentieth of it
BERT_CONFIG = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of `folder` that its tokenizer is made of, sorted by name."""
    names = (*SETTINGS, *VOCABULARIES, "tokenizer.json.gz")
    return sorted(path for name in names if (path := folder / name).is_file())


def resolve_tokenizer(folder: Path, destination: Path) -> Path:
    """Copy the tokenizer of `folder` to `destination` so that `AutoTokenizer.from_pretrained` loads it; return that.

    `tokenizer.json.gz` is unpacked where there is no tokenizer.json. A lone vocab.txt, as BERT models have it, is
    taken for lower-case word pieces unless tokenizer_config.json says otherwise.
    """
    files = {path.name: path for path in tokenizer_files(folder)}
    if not files.keys() - set(SETTINGS):
        raise UserError(f"{folder}: no tokenizer here; expected one of {', '.join(VOCABULARIES)}, tokenizer.json.gz")
    packed = files.pop("tokenizer.json.gz", None)
    for name, path in files.items():
        write_atomic(destination / name, path.read_bytes())
    if packed is not None and "tokenizer.json" not in files:
        write_atomic(destination / "tokenizer.json", _unpacked(packed))
    if "vocab.txt" in files and not files.keys() & {"tokenizer_config.json", "tokenizer.json"}:
        write_atomic(destination / "tokenizer_config.json", json.dumps(BERT_CONFIG))
    return destination


def _unpacked(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST_UNPACKED_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged, or no gzip file ({error}); download or pack it again") from None
    if len(content) > LARGEST_UNPACKED_BYTES:
        raise UserError(f"{path}: unpacks to more than {LARGEST_UNPACKED_BYTES // 2**20} MiB, which no tokenizer does")
    return content


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder that `AutoTokenizer` understands; neither the network nor code of the folder is used.

    The class that tokenizer_config.json names is taken directly where transformers has it: `AutoTokenizer` would find
    the same one, but importing it imports torch, which costs seconds and which counting tokens does not need.
    """
    import transformers

    settings_file = folder / "tokenizer_config.json"
    settings: Any = read_json(settings_file) if settings_file.exists() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{settings_file}: holds no JSON object; take the tokenizer's files from their source again")
    named = getattr(transformers, str(settings.get("tokenizer_class")), None)
    if not _is_tokenizer(named):
        named = transformers.PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else None
    if named is None and "auto_map" in settings:
        raise UserError(f"{folder}: its tokenizer is code of its own, which is never run; use a model without such")
    try:
        return (named or transformers.AutoTokenizer).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the libraries below raise a dozen kinds, plain Exception among them
        raise UserError(f"{folder}: no tokenizer could be loaded from it ({type(error).__name__}: {error})") from None


def _is_tokenizer(named: Any) -> bool:
    """Whether a name of transformers is a tokenizer: models and pipelines have `from_pretrained` as well."""
    import transformers

    return isinstance(named, type) and issubclass(named, transformers.PreTrainedTokenizerBase)
