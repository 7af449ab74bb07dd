"""Everything that a run needs before its first step: model, method, strategy, optimizer; and the gates on them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunemap.config import LoraMethod, QloraMethod
from tunemap.data.batches import Schedule
from tunemap.distributed.strategies import transformer_blocks, unwrap, wrap
from tunemap.distributed.world import World
from tunemap.gates.result import GateResult
from tunemap.methods.apply import apply_method
from tunemap.methods.parameters import ParameterCounts, count_parameters
from tunemap.models.loading import Quantization, load_model
from tunemap.run import Run
from tunemap.training.costs import Costs, closed_form
from tunemap.training.effects import adapter_layers, expected_trainable, model_gates
from tunemap.training.loop import TrainingState
from tunemap.training.optimizer import build_optimizer
from tunemap.training.precision import DTYPES, PRECISIONS, Precision


@dataclass(frozen=True)
class Assembled:
    """A run ready to train, with what is known of it now."""

    state: TrainingState
    precision: Precision
    parameters: ParameterCounts
    blocks: list[nn.Module]
    costs: Costs | None
    gates: list[GateResult]
    facts: dict[str, Any]


def assemble(run: Run, model_folder: Path, world: World, schedule: Schedule, *, num_labels: int | None) -> Assembled:
    """Build model, optimizer and scaler of a run on this rank's device."""
    factors = run.factors
    precision = PRECISIONS[factors.precision]
    model = load_model(
        model_folder,
        task_kind=run.task_kind,
        num_labels=num_labels,
        dtype=precision.frozen if isinstance(run.method, LoraMethod) else precision.trained,
        quantization=quantization_of(run, precision),
        attention=factors.attention,
        seed=factors.seed,
        device=world.device,
    )
    expected = expected_trainable(model, run)
    trained = apply_method(
        model,
        run.method,
        task_kind=run.task_kind,
        trained_dtype=precision.trained,
        adapter_dtype=DTYPES[run.method.adapter_dtype] if isinstance(run.method, LoraMethod) else None,
        seed=factors.seed,
    )
    if factors.gradient_checkpointing:
        # Not re-entrant: the re-entrant kind needs inputs that require gradients and breaks DDP's hooks.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters, blocks = count_parameters(trained), transformer_blocks(trained)
    costs = closed_form(trained, model.config, run, schedule, device_type=world.device.type)
    facts = {
        "transformer_blocks": len(blocks),
        "adapter_layers": adapter_layers(trained),
        "expected_trainable_parameters": expected,
        "trained_dtypes": sorted({str(p.dtype) for p in trained.parameters() if p.requires_grad}),
        "frozen_dtypes": sorted({str(p.dtype) for p in trained.parameters() if not p.requires_grad}),
        "compute_dtype": str(precision.compute),
    }
    if factors.compile:
        _compile(trained)
    shared = wrap(trained, factors.strategy, world, compute=_gathered_dtype(run, precision))
    optimizer = build_optimizer(
        shared.parameters(),
        name=factors.optimizer,
        learning_rate=factors.learning_rate,
        weight_decay=factors.weight_decay,
    )
    scaler = torch.amp.GradScaler(world.device.type) if precision.scaler else None
    gates = model_gates(unwrap(shared), run, expected=expected, trainable=parameters.trainable)
    state = TrainingState(shared, optimizer, scaler)
    return Assembled(state, precision, parameters, blocks, costs, gates, facts)


def quantization_of(run: Run, precision: Precision) -> Quantization | None:
    """The 4-bit storage that a method asks for, with products in the run's compute dtype."""
    if not isinstance(run.method, QloraMethod):
        return None
    return Quantization(run.method.quantization_type, run.method.double_quantization, precision.compute)


def _gathered_dtype(run: Run, precision: Precision) -> torch.dtype | None:
    # 4-bit weights travel as packed bytes; casting them would destroy them.
    return None if isinstance(run.method, QloraMethod) else precision.autocast


def _compile(model: nn.Module) -> None:
    """Compile each transformer block: blocks are alike, so one compilation serves them all."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    for block in transformer_blocks(model):
        block.compile()
