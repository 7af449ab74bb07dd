"""Source `hub`: a model of the Hugging Face hub at one revision, downloaded through the shared cache of HF_HOME."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from tunemap.config import HubModel
from tunemap.errors import UserError
from tunemap.files import sha256_of
from tunemap.models import local
from tunemap.models.loading import brief

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # config, weights and tokenizer
SUBFOLDERS = ["*/*"]  # hold the same weights for other programs

_SHA256 = re.compile("[0-9a-f]{64}")


def download(model: HubModel, folder: Path, *, show_progress: bool) -> dict[str, Any]:
    """Fetch the model, or find it in the cache, and take it over like a local folder; returns the resolved commit."""
    snapshot = _snapshot(model, show_progress)
    _check_blobs(model, snapshot)
    local.take(snapshot, folder)
    return {"commit": snapshot.name}


def _snapshot(model: HubModel, show_progress: bool) -> Path:
    hidden = are_progress_bars_disabled()
    if not show_progress:
        disable_progress_bars()
    try:
        return Path(
            snapshot_download(model.id, revision=model.revision, allow_patterns=FILES, ignore_patterns=SUBFOLDERS)
        )
    except GatedRepoError as error:
        raise UserError(
            f"{model.id} is gated: accept its licence at https://huggingface.co/{model.id}, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{model.id}: no such model on the hub (a private one needs `hf auth login`); check `id` of the model"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{model.id}: no revision {model.revision} on the hub; check `revision`") from error
    except HFValidationError as error:
        raise UserError(f"{model.id}: not a model id of the form owner/name ({error})") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{model.id} (revision {model.revision}) is not in the cache and the hub cannot be reached. On a machine "
            f"with network run `hf download {model.id} --revision {model.revision}` with the same HF_HOME, or copy "
            "the model here and use `source: local` with its path"
        ) from error
    except Exception as error:  # the library's HTTP client has errors of its own, and changes with its versions
        raise UserError(
            f"{model.id} (revision {model.revision}): the download failed ({type(error).__name__}: {brief(error)}); "
            "run the workflow again: it goes on where the download ended"
        ) from error
    finally:
        if not hidden and not show_progress:
            enable_progress_bars()


def _check_blobs(model: HubModel, snapshot: Path) -> None:
    """Refuse a file of the cache that is not what the hub has: the name of a large file's blob is its SHA-256.

    The library compares sizes alone, and a cache is shared for years by everything on a machine.
    """
    for path in sorted(snapshot.iterdir()):
        blob = path.resolve()
        if _SHA256.fullmatch(blob.name) and sha256_of(blob) != blob.name:
            raise UserError(
                f"{model.id}: {path.name} in the cache is damaged: remove it with `rm {shlex.quote(str(blob))}` and "
                "run the workflow again, which downloads it anew"
            )
