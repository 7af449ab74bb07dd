"""Everything that a run needs before its first step: model, method, strategy, optimizer; and the gates on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunemap.config import AdapterMethod, DataDriven, PeftMethod
from tunemap.data.batches import Schedule
from tunemap.data.collate import Batch as MicroBatch
from tunemap.data.tokens import Tokens
from tunemap.distributed.strategies import transformer_blocks, unwrap, wrap
from tunemap.distributed.world import World
from tunemap.gates.result import GateResult
from tunemap.methods.apply import Batches, Start, adapt
from tunemap.methods.estimation import estimation_batches
from tunemap.methods.parameters import ParameterCounts, count_parameters
from tunemap.methods.undisturbed import Batch, model_loss
from tunemap.models.loading import Quantization, load_model
from tunemap.run import Run
from tunemap.training.costs import Costs, closed_form
from tunemap.training.effects import adapter_layers, causal_gate, expected_trainable, model_gates, packed_gate
from tunemap.training.label_logits import LabelLogits
from tunemap.training.loop import TrainingState
from tunemap.training.optimizer import optimizer_of
from tunemap.training.packed_attention import attend_by_document, by_document
from tunemap.training.precision import DTYPES, PRECISIONS, Precision

LossOf = Callable[[nn.Module, MicroBatch], torch.Tensor]
"""Turns a batch into its summed loss."""


@dataclass(frozen=True)
class Assembled:
    """A run ready to train, with what is known of it now."""

    state: TrainingState
    precision: Precision
    parameters: ParameterCounts
    blocks: list[nn.Module]
    costs: Costs | None
    loss_of: LossOf | None  # None: `loop.loss_sum`
    estimation_peak_bytes: int | None
    gates: list[GateResult]
    facts: dict[str, Any]


def assemble(
    run: Run,
    model_folder: Path,
    world: World,
    schedule: Schedule,
    tokens: Tokens,
    *,
    estimating: Callable[[], AbstractContextManager[None]] = nullcontext,
    planned: dict[str, Any] | None = None,
    total_steps: int | None = None,
) -> Assembled:
    """Build model, optimizer and scaler of a run on this rank's device.

    `estimating` is opened around what a method computes from data; `planned` is what it had decided before this run
    was interrupted; `total_steps` are those of the whole run where `schedule` ends before, as in a capture.
    """
    factors = run.factors
    precision = PRECISIONS[factors.precision]

    def load(quantization: Quantization | None) -> nn.Module:
        return load_model(
            model_folder,
            task_kind=run.task_kind,
            num_labels=len(tokens.label_names) or None,
            dtype=precision.frozen if isinstance(run.method, AdapterMethod) else precision.trained,
            quantization=quantization,
            attention=factors.attention,
            seed=factors.seed,
            device=world.device,
        )

    model: Any = load(quantization_of(run, precision))
    expected = expected_trainable(model, run)
    with precision.autocast_context(world.device.type):
        looking = [causal_gate(model)] if run.task_kind == "generation" else []
    adapted = adapt(
        model,
        run.method,
        task_kind=run.task_kind,
        trained_dtype=precision.trained,
        adapter_dtype=DTYPES[run.method.adapter_dtype] if isinstance(run.method, AdapterMethod) else None,
        seed=factors.seed,
        start=Start(
            batches=lambda shared: _estimation_batches(run, tokens, world, shared=shared),
            loss_function=lambda model, batch: _estimation_loss(model, batch, precision, world.device.type),
            load_original=lambda: load(None),
            total_steps=schedule.steps if total_steps is None else total_steps,
            estimating=estimating,
            checkpointing=factors.gradient_checkpointing,
            planned=planned,
        ),
    )
    trained, expected = adapted.model, expected if adapted.trainable is None else adapted.trainable
    if factors.gradient_checkpointing:
        # Not re-entrant: the re-entrant kind needs inputs that require gradients and breaks DDP's hooks.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters, blocks = count_parameters(trained), transformer_blocks(trained)
    costs = None  # of what other methods compute besides the model there is no formula
    if not isinstance(run.method, PeftMethod):
        costs = closed_form(trained, model.config, run, schedule, tokens, device_type=world.device.type)
    facts = {
        "transformer_blocks": len(blocks),
        "adapter_layers": adapter_layers(trained),
        "expected_trainable_parameters": expected,
        "trained_dtypes": sorted({str(p.dtype) for p in trained.parameters() if p.requires_grad}),
        "frozen_dtypes": sorted({str(p.dtype) for p in trained.parameters() if not p.requires_grad}),
        "compute_dtype": str(precision.compute),
        **adapted.facts,
    }
    if by_document(factors, world.device.type):
        attend_by_document(model)
    if factors.batching == "packed":
        with precision.autocast_context(world.device.type):
            looking.append(packed_gate(model))
    loss_of = loss_function(model, run)
    if factors.compile:
        _compile(trained)
    shared = spread(trained, run, world, precision)
    optimizer = optimizer_of(unwrap(shared), factors, learning_rate_ratio=adapted.learning_rate_ratio)
    scaler = torch.amp.GradScaler(world.device.type) if precision.scaler else None
    gates = looking + model_gates(unwrap(shared), run, expected=expected, trainable=parameters.trainable)
    state = TrainingState(shared, optimizer, scaler)
    return Assembled(state, precision, parameters, blocks, costs, loss_of, adapted.estimation_peak_bytes, gates, facts)


def loss_function(model: nn.Module, run: Run) -> LossOf | None:
    """What turns a batch into a summed loss where factor `logits` asks for another than `loop.loss_sum`.

    `model` has its adapters, and is not wrapped for several devices yet. Raises UnsupportedRunError where the model's
    output layer does not allow what the factor asks for.
    """
    return LabelLogits(model).loss_sum if run.factors.logits == "label_tokens" else None


def _estimation_batches(run: Run, tokens: Tokens, world: World, *, shared: bool) -> Batches:
    """The batches that the method's start looks at: with `shared` all of them, else this rank's share."""
    assert isinstance(run.method, DataDriven)
    return list(
        estimation_batches(
            tokens,
            batch_count=run.method.estimation_batches,
            batch_size=run.method.estimation_batch_size or run.factors.per_device_batch_size,
            seed=run.factors.seed,
            device=world.device,
            **({} if shared else {"rank": world.rank, "world_size": world.size}),
        )
    )


def _estimation_loss(model: nn.Module, batch: Batch, precision: Precision, device_type: str) -> torch.Tensor:
    with precision.autocast_context(device_type):
        return model_loss(model, batch)


def quantization_of(run: Run, precision: Precision) -> Quantization | None:
    """The 4-bit storage that a method asks for, with products in the run's compute dtype."""
    method: Any = run.method
    if method.base_quantization is None:
        return None
    return Quantization(method.base_quantization, method.double_quantization, precision.compute)


def spread(model: nn.Module, run: Run, world: World, precision: Precision) -> nn.Module:
    """The model over all devices of the run, as its strategy says."""
    return wrap(
        model,
        run.factors.strategy,
        world,
        compute=_gathered_dtype(run, precision),
        reshard_after_forward=run.factors.reshard_after_forward,
        unit=run.factors.fsdp_unit,
    )


def _gathered_dtype(run: Run, precision: Precision) -> torch.dtype | None:
    # 4-bit weights travel as packed bytes; casting them would destroy them.
    return None if run.method.base_quantization else precision.autocast


def _compile(model: nn.Module) -> None:
    """Compile each transformer block: blocks are alike, so one compilation serves them all."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    for block in transformer_blocks(model):
        block.compile()
