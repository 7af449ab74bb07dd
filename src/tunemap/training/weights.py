"""Saving what was learned: an adapter or a full model, in the layout that `from_pretrained` loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from tunemap.distributed.strategies import unwrap
from tunemap.distributed.world import World
from tunemap.files import read_json, write_json
from tunemap.methods.peft_types import save_adapter
from tunemap.models.loading import quiet
from tunemap.run import Run

ADAPTER_CONFIG = "adapter_config.json"  # peft's name
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
        _order_sets(partial / ADAPTER_CONFIG, inner.peft_config["default"])
    else:
        inner.save_pretrained(partial, state_dict=state)  # type: ignore[operator]
        for pattern in _TOKENIZER_FILES:
            for path in model_folder.glob(pattern):
                shutil.copy(path, partial / path.name)
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    shutil.rmtree(weights_folder, ignore_errors=True)
    partial.rename(weights_folder)


def _order_sets(file: Path, config: PeftConfig) -> None:
    """Put names of modules in order: peft writes sets as they come, in another order in every process."""
    values = read_json(file)
    ordered = {key: sorted(values[key]) for key, value in vars(config).items() if isinstance(value, set)}
    write_json(file, values | ordered)
