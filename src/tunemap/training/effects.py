"""Proof that each factor took effect, read off the live model, its optimizer and one watched step."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tunemap.config import AdapterMethod, LoraMethod, LowRankMethod
from tunemap.distributed.communication import Collective
from tunemap.distributed.strategies import transformer_blocks
from tunemap.gates.model import (
    adapters_gate,
    attention_gate,
    autocast_gate,
    causality_gate,
    compile_gate,
    documents_apart_gate,
    fsdp_units_gate,
    optimizer_state_gate,
    quantised_layers_gate,
    recomputation_gate,
    resharding_gate,
    trainable_parameters_gate,
)
from tunemap.gates.result import GateResult
from tunemap.measure.witness import Seen
from tunemap.methods.apply import head_modules
from tunemap.methods.parameters import adapter_ids, count_parameters, linear_shapes, lora_closed_form
from tunemap.run import Run
from tunemap.training.precision import PRECISIONS

_PROBE_TOKENS = 8  # of the sequence on which it is seen where a model looks
_SMALLEST_8BIT_STATE = 4096  # elements; bitsandbytes keeps the moments of smaller tensors in float32 (min_8bit_size)


def expected_trainable(model: nn.Module, run: Run) -> int | None:
    """Trainable parameters that the run's method gives the bare `model`, in closed form; None for other methods.

    Taken before the method is applied: full fine-tuning trains all that is there, LoRA r × (in + out) per target and
    the new heads of a classifier.
    """
    if run.method.kind == "full":
        return count_parameters(model).total
    if not isinstance(run.method, LoraMethod):
        return None
    shapes = {
        name: shape for name, shape in linear_shapes(model).items() if _is_target(name, run.method.target_modules)
    }
    heads = head_modules(model) if run.task_kind == "classification" else []
    trained_heads = sum(parameter.numel() for name in heads for parameter in model.get_submodule(name).parameters())
    return lora_closed_form(shapes, run.method.rank) + trained_heads


def _is_target(name: str, targets: str | Sequence[str]) -> bool:
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def model_gates(model: nn.Module, run: Run, *, expected: int | None, trainable: int) -> list[GateResult]:
    """Gates on the model as it is before the first step; `model` is the one inside DDP."""
    results = [trainable_parameters_gate(trainable, expected)] if expected is not None else []
    packed, linears = _packed_layers(model)
    results.append(quantised_layers_gate(packed, linears, asked=run.method.base_quantization is not None))
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    sharded = run.factors.strategy in ("fsdp", "hybrid")
    results.append(fsdp_units_gate(units, len(transformer_blocks(model)), sharded=sharded))
    if isinstance(run.method, AdapterMethod):
        results.append(_adapters_gate(model, run, run.method))
    return results


def _adapters_gate(model: nn.Module, run: Run, method: AdapterMethod) -> GateResult:
    of_adapter = adapter_ids(model)
    return adapters_gate(
        adapter_layers(model),
        {_name(p.dtype) for p in model.parameters() if id(p) in of_adapter},
        method.adapter_dtype,
        others={_name(p.dtype) for p in model.parameters() if p.requires_grad and id(p) not in of_adapter},
        trained_dtype=_name(PRECISIONS[run.factors.precision].trained),
        one_class=isinstance(method, LowRankMethod),
    )


def causal_gate(model: Any) -> GateResult:
    """Gate on where a model for generation looks, from the middle of a few tokens.

    An exact zero, whatever the kernels: what a causal model masks has no part in its sums.
    """
    middle = _PROBE_TOKENS // 2
    reach = _reach(model, middle - 1)
    return causality_gate(reach[middle:].max().item(), reach[:middle].max().item())


def packed_gate(model: Any) -> GateResult:
    """Gate on where a model for generation looks, from the end of two documents in one row."""
    middle = _PROBE_TOKENS // 2
    positions = torch.arange(middle, device=model.device).repeat(2)[None]
    reach = _reach(model, _PROBE_TOKENS - 1, position_ids=positions)
    return documents_apart_gate(reach[:middle].max().item(), reach[middle:].max().item())


def _reach(model: Any, place: int, **inputs: torch.Tensor) -> torch.Tensor:
    """Largest gradients of the logits at `place` with respect to the embedding of each token, by one backward pass."""
    embedded: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    was_training = model.training
    hook = model.eval().get_input_embeddings().register_forward_hook(keep)
    try:
        ids = torch.arange(_PROBE_TOKENS, device=model.device)[None]
        logits = model(input_ids=ids, use_cache=False, **inputs).logits
    finally:
        hook.remove()
        model.train(was_training)
    (gradient,) = torch.autograd.grad(logits[0, place].float().square().sum(), embedded)
    return gradient[0].abs().amax(1)


def adapter_layers(model: nn.Module) -> dict[str, int]:
    """How many adapter layers of each class the model has, by the class's full name."""
    kinds = (type(module) for module in model.modules() if isinstance(module, BaseTunerLayer))
    return dict(Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds))


def _packed_layers(model: nn.Module) -> tuple[int, int]:
    """4-bit linear layers with packed weights, and all linear layers, of the blocks; adapters do not count."""
    linears = [
        module
        for block in transformer_blocks(model)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    ]
    return sum(getattr(module.weight, "quant_state", None) is not None for module in linears), len(linears)


def gathering_gates(run: Run, collectives: Sequence[Collective], blocks: int) -> list[GateResult]:
    """Gate on the weights that one step gathered; none where nothing is sharded over several devices, or in blocks."""
    if run.factors.strategy not in ("fsdp", "hybrid") or run.factors.gpus == 1 or run.factors.fsdp_unit == "model":
        return []
    gathers = sum(one.calls for one in collectives if one.kind == "all_gather")
    micro_batches, asked = run.factors.gradient_accumulation, run.factors.reshard_after_forward
    return [resharding_gate(gathers, blocks + 1, micro_batches, asked=asked)]


def step_gates(run: Run, seen: Seen, blocks: int) -> list[GateResult]:
    """Gates on what one step computed."""
    factors, precision = run.factors, PRECISIONS[run.factors.precision]
    compute = precision.compute if isinstance(run.method, AdapterMethod) else precision.autocast or precision.trained
    return [
        recomputation_gate(
            seen.block_computations, blocks, factors.gradient_accumulation, asked=factors.gradient_checkpointing
        ),
        attention_gate(seen.attention_kernels, factors.attention),
        autocast_gate(seen.matmul_flops, _name(compute)),
    ]


def optimizer_gate(optimizer: torch.optim.Optimizer, name: str) -> GateResult:
    """Gate on the dtypes of the optimizer's moments, and on the rank of projected ones; call after a step."""
    found, expected = _projected_moments(optimizer)
    inner = getattr(optimizer, "_inner", optimizer)  # of an optimizer that runs on the shards of this rank
    for parameter, state in inner.state.items():
        moments = [v for v in state.values() if isinstance(v, torch.Tensor) and v.numel() == parameter.numel() > 1]
        found |= {_name(moment.dtype) for moment in moments}
        if moments:
            expected.add(_moment_dtype(name, parameter))
    return optimizer_state_gate(found, expected)


def _projected_moments(optimizer: torch.optim.Optimizer) -> tuple[set[str], set[str]]:
    """What GaLore keeps of each projected gradient, and what its rank asks for; nothing for other optimizers."""
    found: set[str] = set()
    expected: set[str] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"] if "rank" in group else ():
            moment = optimizer.state[parameter]["exp_avg"]
            found.add(f"{_name(moment.dtype)} of rank {moment.numel() / max(parameter.shape):g}")
            expected.add(f"{_name(parameter.dtype)} of rank {min(group['rank'], *parameter.shape)}")
    return found, expected


def _moment_dtype(name: str, parameter: torch.Tensor) -> str:
    if name in ("adamw", "galore_adamw"):
        return _name(parameter.dtype)
    if name == "lomo" or (name in ("adalomo", "adafactor") and parameter.dim() > 1):
        return "no moments of the whole weight"
    return "uint8" if "8bit" in name and parameter.numel() >= _SMALLEST_8BIT_STATE else "float32"


def compilation_gate(asked: bool) -> GateResult:
    """Gate on the graphs that this process compiled so far."""
    compiler = sys.modules.get("torch._dynamo.utils")  # importing it takes a second, and who compiled has it
    return compile_gate(compiler.counters["stats"]["unique_graphs"] if compiler else 0, asked=asked)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
