"""The processes of test_sharded_methods: each type of peft, alone and sharded over both, one after the other."""

import json
import os
from pathlib import Path
from typing import Any

from tests.distributed import ranks

STEPS = 2
PARAMETERS = {"TRAINABLE_TOKENS": {"token_indices": [5, 6]}}
NEEDS_DATA = ("EVA", "LORA_GA", "CORDA")
NOT_HERE = ("LOFTQ",)  # LoRA over 4-bit weights, which other tests shard, from another start


def train_all(rank: int, port: int, folder: Path) -> None:
    """As one of two processes, train every type that may be sharded; rank 0 writes seen.json."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from tunemap.distributed.world import join_world
    from tunemap.methods.peft_types import SUPPORTED
    from tunemap.methods.sharding import UNSHARDABLE

    torch.set_num_threads(1)
    world = join_world("cpu", strategy="fsdp", expected_size=2)
    seen = {}
    for name in SUPPORTED:
        if name in UNSHARDABLE or name in NOT_HERE:
            continue
        alone, sharded = (_trained(name, strategy, world, folder) for strategy in ("single", "fsdp"))
        if world.is_main:
            seen[name] = {"alone": alone, "sharded": sharded, **_compared(folder / name)}
    if world.is_main:
        (folder / "seen.json").write_text(json.dumps(seen))
    world.barrier()
    os._exit(0)


def _trained(name: str, strategy: str, world: Any, folder: Path) -> list[float]:
    """Losses of two steps on the same batch in each process; the adapter is saved."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunemap.distributed.strategies import wrap
    from tunemap.methods.peft_types import SUPPORTED, apply_peft, build_config
    from tunemap.training.weights import save_weights

    kinds = SUPPORTED[name].model_types
    settings = ranks.ARCHITECTURE | ({"model_type": kinds[0]} if kinds else {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    parameters = PARAMETERS.get(name, {})
    config = build_config(name, parameters, model=model, task_type="CAUSAL_LM", total_steps=10)
    ids = torch.arange(4 * 12).reshape(4, 12)
    batches = [{"input_ids": ids, "labels": ids}]
    peft_model = apply_peft(model, config, batches=batches if name in NEEDS_DATA else None)
    shared = wrap(peft_model.train(), strategy, world, reshard_after_forward=True)
    trained = [parameter for parameter in shared.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)  # of methods that draw in the forward pass
        loss = shared(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    save_weights(shared, None, folder, folder / name / strategy, world)  # type: ignore[arg-type]
    return losses


def _compared(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    alone, sharded = (load_file(folder / strategy / "adapter_model.safetensors") for strategy in ("single", "fsdp"))
    assert alone.keys() == sharded.keys(), folder.name
    apart = max((alone[key] - sharded[key]).abs().max().item() for key in alone)
    return {"tensors": len(alone), "apart": apart}
