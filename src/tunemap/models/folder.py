"""A prepared model folder: hub layout plus model.json, built beside its place and renamed, so it is whole or absent.

model.json, the manifest, says where the model came from, what it is, and the size and SHA-256 of every file:

    {"source": {"source": "tiny", "architecture": "qwen2", "seed": 0}, "architecture": "Qwen2ForCausalLM",
     "parameters": 131648, "files": {"model.safetensors": {"size_bytes": 529464, "sha256": "ab12..."}, ...}}
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import damaged, read_json, read_sealed, sha256_of, write_sealed

MANIFEST = "model.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"  # lists the shards of weights that are split
LARGEST_COPY_BYTES = 64 * 2**20  # larger files are linked: a copy of 15 GB of weights helps nobody


@contextmanager
def build_folder(destination: Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes `destination` when the block ends, and is removed when it fails.

    What a killed attempt left is removed by the next one. Files become readable by everyone: safetensors are
    written with mode 0600 whatever the umask, and result trees are shared with a team.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.iterdir():
            if not path.is_symlink():
                path.chmod(0o644)
                _sync(path)
        _sync(partial)
        if destination.is_dir():
            shutil.rmtree(destination)
        partial.rename(destination)
        _sync(destination.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights of `folder`; `UserError` where there are none or one is absent.

    Shards are files of the folder itself, and none is a pickle, which could run code when it is loaded.
    """
    if (folder / WEIGHTS_INDEX).is_file():
        names = _shards(folder / WEIGHTS_INDEX)
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(f"{folder / WEIGHTS_INDEX}: lists shards that are not there: {', '.join(absent)}")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    raise UserError(f"{folder}: no weights; expected {WEIGHTS}, or {WEIGHTS_INDEX} with its shards")


def _shards(index: Path) -> list[str]:
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{index}: has no weight_map of tensors and their files; download the model again")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or "\0" in name:
            raise UserError(f"{index}: the shard {name!r} is no file of this folder")
        if not name.endswith(".safetensors"):
            raise UserError(f"{index}: the shard {name} is no .safetensors file, and others are not loaded")
    return names


def bring(source: Path, folder: Path) -> None:
    """Copy a file into `folder`, or link it there if it is large."""
    if source.stat().st_size > LARGEST_COPY_BYTES:
        (folder / source.name).symlink_to(source.resolve())
    else:
        shutil.copyfile(source, folder / source.name)


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write model.json: `facts`, then size and SHA-256 of every file of the folder."""
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
        | ({"linked_to": str(path.readlink())} if path.is_symlink() else {})
        for path in sorted(folder.iterdir())
    }
    write_sealed(folder / MANIFEST, facts | {"files": files})


def check_sizes(folder: Path) -> None:
    """Refuse a folder whose files are not those of its manifest, and set it aside; one without a manifest passes.

    Files that were copied are compared by digest, the large ones that are linked by size alone: reading 15 GB of
    weights twice at the start of each run would cost minutes, and what happens to them in practice is that the target
    of a link is moved or downloaded anew.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; run the workflow to prepare it")
    if not (folder / MANIFEST).is_file():
        return
    try:
        manifest = read_sealed(folder / MANIFEST)
    except UserError as error:
        raise damaged(folder, str(error).partition(";")[0]) from None
    for name, recorded in manifest["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != recorded["size_bytes"]:
            target = f" (a link to {path.readlink()})" if path.is_symlink() else ""
            now = "is gone" if found is None else f"has {found} bytes instead of {recorded['size_bytes']}"
            raise damaged(folder, f"{path}{target} {now}")
        if recorded["size_bytes"] <= LARGEST_COPY_BYTES and sha256_of(path) != recorded["sha256"]:
            raise damaged(folder, f"{path} changed after it was written")
