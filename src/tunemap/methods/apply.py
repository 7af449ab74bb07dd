"""Turns a loaded model into the one that a method trains: what learns, in which dtype, with which adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from tunemap.config import FullMethod, GoraMethod, LoraMethod, LowRankMethod, PeftMethod
from tunemap.errors import UserError
from tunemap.measure.memory import track_live_storage
from tunemap.methods import gora
from tunemap.methods.estimation import widest
from tunemap.methods.lora_layers import fuse_low_rank_sums
from tunemap.methods.parameters import adapter_ids
from tunemap.methods.peft_types import apply_peft, build_config
from tunemap.methods.undisturbed import LossFunction
from tunemap.run import RunMethod, TaskKind

Batches = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Start:
    """What the start of a method may use of its run, besides the model: data, original weights, an earlier plan.

    batches:       estimation batches on the model's device: this process's share, or with `shared` all of them.
    loss_function: mean loss per label token of such a batch, in the run's precision.
    load_original: loads the model once more, in the same dtype and not quantised.
    total_steps:   optimizer steps of the run.
    estimating:    opened around what the start computes from data.
    checkpointing: whether the run recomputes activations; the estimation then does too.
    planned:       summary of the plan of the interrupted run that this process continues.
    """

    batches: Callable[[bool], Batches]
    loss_function: LossFunction
    load_original: Callable[[], nn.Module]
    total_steps: int
    estimating: Callable[[], AbstractContextManager[None]] = nullcontext
    checkpointing: bool = False
    planned: dict[str, Any] | None = None


@dataclass(frozen=True)
class Adapted:
    """A model ready to be trained, and what its method decided.

    trainable:             closed form of the trainable parameters where the method decided on them, heads included.
    learning_rate_ratio:   of lora_B's learning rate to the others'.
    estimation_peak_bytes: peak tensor memory of the estimation on this device; None where there was none.
    facts:                 for outcome.json: `gora`, the plan's summary.
    """

    model: nn.Module
    trainable: int | None = None
    learning_rate_ratio: float = 1.0
    estimation_peak_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def adapt(
    model: nn.Module,
    method: RunMethod,
    *,
    task_kind: TaskKind,
    trained_dtype: torch.dtype,
    adapter_dtype: torch.dtype | None,
    seed: int,
    start: Start,
) -> Adapted:
    """Prepare `model` for training with any method; `start` is asked by methods that look at data only.

    Deterministic in `seed` and the batches. Every process of a group calls this before the model is wrapped; all of
    them get the same model.
    """
    if isinstance(method, GoraMethod):
        assert adapter_dtype is not None
        adapted = _with_gora(model, method, task_kind=task_kind, seed=seed, start=start)
        set_dtypes(adapted.model, adapter_dtype, trained_dtype)
    elif isinstance(method, PeftMethod):
        assert adapter_dtype is not None
        adapted = _with_peft(model, method, task_kind=task_kind, seed=seed, start=start)
        set_dtypes(adapted.model, adapter_dtype, trained_dtype)
    else:
        trained = apply_method(
            model, method, task_kind=task_kind, trained_dtype=trained_dtype, adapter_dtype=adapter_dtype, seed=seed
        )
        ratio = method.learning_rate_ratio if isinstance(method, LowRankMethod) else None
        adapted = Adapted(trained, learning_rate_ratio=ratio or 1.0)
    fuse_low_rank_sums(adapted.model)
    return adapted


def apply_method(
    model: nn.Module,
    method: RunMethod,
    *,
    task_kind: TaskKind,
    trained_dtype: torch.dtype,
    adapter_dtype: torch.dtype | None,
    seed: int,
) -> nn.Module:
    """Prepare `model` for full fine-tuning, LoRA or QLoRA; returns the model to train (peft's wrapper for adapters).

    Adapters are drawn from `seed` alone, so every rank and every strategy starts from the same ones. Newly made
    heads of classifiers are trained by every method, in `trained_dtype`.
    """
    torch.manual_seed(seed)
    if isinstance(method, FullMethod):
        model.requires_grad_(True)
        return model
    if not isinstance(method, LoraMethod):
        raise UserError(f"method kind {method.kind} does not train")
    assert adapter_dtype is not None
    adapted = get_peft_model(model, lora_config(model, method, task_kind), autocast_adapter_dtype=False)
    set_dtypes(adapted, adapter_dtype, trained_dtype)
    return adapted


def lora_config(model: nn.Module, method: LoraMethod, task_kind: TaskKind) -> LoraConfig:
    """peft's configuration of a LoRA method; a classifier's head is trained as a whole and gets no adapter."""
    heads = head_modules(model) if task_kind == "classification" else []
    targets = method.target_modules
    return LoraConfig(
        r=method.rank,
        lora_alpha=2 * method.rank if method.alpha is None else method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=heads or None,
        modules_to_save=heads or None,
        use_rslora=method.rslora,
        bias="none",
        task_type=_task_type(task_kind),
    )


def set_dtypes(
    adapted: nn.Module, adapter_dtype: torch.dtype, trained_dtype: torch.dtype, *, trained: Collection[str] = ()
) -> None:
    """Keep adapters in one dtype, and heads and whatever else is trained in another, as every method must alike.

    `trained` names parameters that were trained, in a model that is loaded for evaluation and trains none.
    """
    of_adapter = adapter_ids(adapted)
    for name, parameter in adapted.named_parameters():
        if id(parameter) in of_adapter:
            parameter.data = parameter.data.to(adapter_dtype)
        elif parameter.requires_grad or "modules_to_save" in name.split(".") or name in trained:
            parameter.data = parameter.data.to(trained_dtype)


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules outside the pretrained backbone: new, untrained, specific to the task."""
    backbone = getattr(model, "base_model_prefix", "")
    return [
        name for name, module in model.named_children() if name != backbone and any(True for _ in module.parameters())
    ]


def gora_settings(method: GoraMethod, seed: int) -> gora.GoraSettings:
    """The settings of a variant with what the study file changes; bounds and alpha follow the reference rank."""
    usual = gora.method(method.variant)
    reference = method.reference_rank or usual.reference_rank
    scale = reference / usual.reference_rank
    followed = {
        "reference_rank": reference,
        "alpha": usual.alpha * scale,
        "min_rank": max(1, int(usual.min_rank * scale)),
        "max_rank": None if usual.max_rank is None else int(usual.max_rank * scale),
    }
    names = ("alpha", "min_rank", "max_rank", "gamma", "learning_rate_ratio", "allocation", "initialisation")
    given = {name: getattr(method, name) for name in (*names, "importance") if getattr(method, name) is not None}
    return gora.method(method.variant, seed=seed, **(followed | given))


def _with_gora(model: nn.Module, method: GoraMethod, *, task_kind: TaskKind, seed: int, start: Start) -> Adapted:
    settings = gora_settings(method, seed)
    if start.planned is not None:
        made = gora.GoraPlan.from_summary(start.planned)
        if made.settings != settings:
            raise UserError(
                "gora: the plan of the interrupted run has other settings; delete the run's unfinished folder"
            )
    else:
        made = _planned(model, method, settings, start)
    heads = head_modules(model) if task_kind == "classification" else []
    head_parameters = sum(parameter.numel() for name in heads for parameter in model.get_submodule(name).parameters())
    adapted = gora.attach(
        model,
        made,
        task_type=_task_type(task_kind).value,
        autocast_adapter_dtype=method.adapter_dtype == "float32",
        initialise=start.planned is None,  # else A and B come from the checkpoint
        lora_dropout=method.dropout,
    )
    return Adapted(
        adapted,
        trainable=made.trainable + head_parameters,
        learning_rate_ratio=settings.learning_rate_ratio,
        estimation_peak_bytes=made.estimation_peak_bytes,
        facts={"gora": made.released().summary()},
    )


def _planned(model: nn.Module, method: GoraMethod, settings: gora.GoraSettings, start: Start) -> gora.GoraPlan:
    """The plan of a run, with the peak memory of making it.

    On a CPU the tracker of live tensors would slow what is timed, so it watches one more pass over the widest batch.
    """
    if not settings.needs_gradients:
        return gora.plan(model, [], settings, targets=_targets(method), route=method.route)
    with start.estimating():
        original = method.base_quantization is not None and method.route == "unquantised"
        estimated = start.load_original() if original else model
        batches = start.batches(False)
        options: dict[str, Any] = {
            "targets": _targets(method),
            "loss_function": start.loss_function,
            "route": method.route,
        }
        with _recomputing(estimated, start.checkpointing):
            made = gora.plan(estimated, batches, settings, **options)
    if made.estimation_peak_bytes is None:
        tracker = track_live_storage(estimated)
        with _recomputing(estimated, start.checkpointing):
            seen = gora.plan(estimated, [widest(batches)], settings, tracker=tracker, **options)
        made = replace(made, estimation_peak_bytes=seen.estimation_peak_bytes)
    return made


def _with_peft(model: nn.Module, method: PeftMethod, *, task_kind: TaskKind, seed: int, start: Start) -> Adapted:
    task_type = _task_type(task_kind).value
    config = build_config(
        method.type, method.parameters, model=model, task_type=task_type, total_steps=start.total_steps
    )
    begins = getattr(config, "init_lora_weights", True)
    needs_data = begins in ("eva", "lora_ga", "corda")
    original = start.load_original() if begins == "loftq" else None
    with start.estimating() if needs_data or original is not None else nullcontext():
        adapted = apply_peft(
            model,
            config,
            # The same batches on every process: such a start changes weights, and nothing averages it.
            batches=start.batches(True) if needs_data else None,
            original_weight=(lambda name: original.get_parameter(f"{name}.weight")) if original is not None else None,
            loss_function=start.loss_function,
            autocast_adapter_dtype=method.adapter_dtype == "float32",
            seed=seed,
        )
    return Adapted(adapted)


def _targets(method: GoraMethod) -> str | list[str]:
    return method.target_modules if isinstance(method.target_modules, str) else list(method.target_modules)


def _task_type(task_kind: TaskKind) -> TaskType:
    return TaskType.SEQ_CLS if task_kind == "classification" else TaskType.CAUSAL_LM


@contextmanager
def _recomputing(model: Any, asked: bool) -> Iterator[None]:
    """Recompute activations inside, as the run will; peft, which comes later, must find the model as it was."""
    if not asked:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
