"""Everything that a run needs before its first step: model, method, strategy, optimizer; and proof that they took effect."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunemap.config import LoraMethod, QloraMethod
from tunemap.distributed.strategies import transformer_blocks, wrap
from tunemap.distributed.world import World
from tunemap.methods.apply import apply_method
from tunemap.methods.parameters import ParameterCounts, count_parameters
from tunemap.models.loading import Quantization, assert_quantised, load_model
from tunemap.run import Run
from tunemap.training.loop import TrainingState
from tunemap.training.optimizer import build_optimizer
from tunemap.training.precision import DTYPES, PRECISIONS, Precision


@dataclass(frozen=True)
class Assembled:
    """A run ready to train, with what is known of it now."""

    state: TrainingState
    precision: Precision
    parameters: ParameterCounts
    facts: dict[str, Any]


def assemble(run: Run, model_folder: Path, world: World, *, num_labels: int | None) -> Assembled:
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
    quantised_layers = assert_quantised(model) if isinstance(run.method, QloraMethod) else 0
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
    parameters = count_parameters(trained)
    facts = {
        "quantised_layers": quantised_layers,
        "transformer_blocks": len(transformer_blocks(trained)),
        "gradient_checkpointing": bool(getattr(model, "is_gradient_checkpointing", False)),
        "trained_dtypes": sorted({str(p.dtype) for p in trained.parameters() if p.requires_grad}),
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
    return Assembled(TrainingState(shared, optimizer, scaler), precision, parameters, facts)


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
