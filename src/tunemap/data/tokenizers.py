"""Make a loadable tokenizer folder from what people have: a hub folder, a gzipped tokenizer.json, a vocab.txt."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tunemap.errors import UserError
from tunemap.files import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
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
        write_atomic(destination / "tokenizer.json", gzip.decompress(packed.read_bytes()))
    if "vocab.txt" in files and not files.keys() & {"tokenizer_config.json", "tokenizer.json"}:
        write_atomic(destination / "tokenizer_config.json", json.dumps(BERT_CONFIG))
    return destination


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder that `AutoTokenizer` understands, without asking the network.

    The class that tokenizer_config.json names is taken directly where transformers has it: `AutoTokenizer` would find
    the same one, but importing it imports torch, which costs seconds and which counting tokens does not need.
    """
    import transformers

    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        named = getattr(transformers, str(settings.get("tokenizer_class")), None)
    except FileNotFoundError:
        named = None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / 'tokenizer_config.json'}: not valid JSON ({error})") from None
    if named is None and (folder / "tokenizer.json").is_file():
        named = transformers.PreTrainedTokenizerFast
    try:
        return (named or transformers.AutoTokenizer).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries below raise a dozen kinds, plain Exception among them
        raise UserError(f"{folder}: no tokenizer could be loaded from it ({type(error).__name__}: {error})") from None
