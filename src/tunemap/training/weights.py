"""Saving what was learned: an adapter or a full model, in the layout that `from_pretrained` loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from tunemap.distributed.strategies import unwrap
from tunemap.distributed.world import World
from tunemap.methods.peft_types import save_adapter
from tunemap.models.loading import quiet
from tunemap.run import Run

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "chat_template*")


def save_weights(model: nn.Module, run: Run, model_folder: Path, weights_folder: Path, world: World) -> None:
    """Write adapter or full model; every rank must call this, rank 0 writes."""
    inner = unwrap(model)
    state = None
    if isinstance(inner, FSDPModule):
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=isinstance(inner, PeftModel)
        )
        state = _without_aliases(inner, get_model_state_dict(inner, options=options))
    if world.is_main:
        with quiet():
            _write(inner, state, model_folder, weights_folder)
    world.barrier()


def _without_aliases(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """`state` without the second names of shared weights: gathered apart, they would be written twice."""
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    aliases -= {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in state.items() if name not in aliases}


def _write(inner: nn.Module, state: dict[str, Any] | None, model_folder: Path, weights_folder: Path) -> None:
    partial = weights_folder.with_name(weights_folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if isinstance(inner, PeftModel):
        save_adapter(inner, partial, get_peft_model_state_dict(inner, state_dict=state) if state else None)
    else:
        inner.save_pretrained(partial, state_dict=state)  # type: ignore[operator]
        for pattern in _TOKENIZER_FILES:
            for path in model_folder.glob(pattern):
                shutil.copy(path, partial / path.name)
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    shutil.rmtree(weights_folder, ignore_errors=True)
    partial.rename(weights_folder)
