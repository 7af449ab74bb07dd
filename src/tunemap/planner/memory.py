"""The account of a run's training step: its code, run on tensors without contents under the live-storage tracker.

Takes 1 to 10 seconds and some hundred megabytes for models up to 70 billion parameters: nothing is allocated and
nothing is computed. Sizes are those of torch's CPU operators; a fused CUDA kernel may keep some rows more or less.
"""

from __future__ import annotations

import math
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedConfig

from tunemap.config import AdapterMethod, GoraMethod
from tunemap.distributed.communication import Collective, CommunicationCounter, communication_rows
from tunemap.distributed.strategies import transformer_blocks, unwrap
from tunemap.distributed.world import World
from tunemap.measure.clock import StepClock
from tunemap.measure.memory import track_live_storage
from tunemap.methods import gora
from tunemap.methods.apply import Start, adapt, gora_settings
from tunemap.methods.parameters import count_parameters, logical_size
from tunemap.methods.undisturbed import model_loss
from tunemap.models.loading import quiet
from tunemap.planner import fake
from tunemap.planner.depth import SHALLOW, SegmentedStorage, Segments, can_be_deepened, deepened, with_depth
from tunemap.planner.prediction import Account, BatchShape, Work
from tunemap.planner.work import WorkCounter
from tunemap.run import Run
from tunemap.training.assemble import LossOf, loss_function, quantization_of, spread
from tunemap.training.frugal import BackwardOptimizer
from tunemap.training.loop import Loop, TrainingState
from tunemap.training.optimizer import optimizer_of
from tunemap.training.packed_attention import attend_by_document, by_document
from tunemap.training.precision import DTYPES, PRECISIONS, Precision

CUDA_BLOCK_BYTES = 512  # CUDA's caching allocator rounds every request up to it
PLANNED_STEPS = 1000  # horizon of schedules; a step far from both ends is looked at
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20


def account(run: Run, config: PreTrainedConfig, batch: BatchShape, *, num_labels: int | None, on_gpu: bool) -> Account:
    """Run one step of `run` at `batch` and tell what rank 0 needs; sizes are rounded as the device's allocator does.

    A deep model of equal blocks is told from two shallow ones. Where the code of a method looks at contents, which are
    not there, this raises what torch raises.
    """
    targets = getattr(run.method, "target_modules", "all-linear")
    blocks = can_be_deepened(config, run.method.kind, targets)
    if blocks is None:
        return _account(run, config, batch, num_labels, on_gpu)[0]
    few, more = (_account(run, with_depth(config, depth), batch, num_labels, on_gpu) for depth in SHALLOW)
    return deepened((few[0], more[0]), (few[1], more[1]), blocks)


def _account(
    run: Run, config: PreTrainedConfig, batch: BatchShape, num_labels: int | None, on_gpu: bool
) -> tuple[Account, Segments]:
    began = time.perf_counter()
    factors, precision = run.factors, PRECISIONS[run.factors.precision]
    block_bytes = CUDA_BLOCK_BYTES if on_gpu else 1
    notes: list[str] = []
    sharded = factors.strategy in ("fsdp", "hybrid")
    with warnings.catch_warnings(), quiet(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        for surroundings in (
            fake.fake_ranks(factors.gpus, needed=sharded),
            fake.as_in_training(batch),
            fake.kernels_of(on_gpu),
        ):
            stack.enter_context(surroundings)
        estimation = _estimation_peak(run, config, batch, num_labels, block_bytes, on_gpu)
        with fake.fake_mode(), fake.packed_weights_gathered():
            model, ratio = _assembled(run, config, num_labels, notes)
            loaded, dequantised = weights_bytes(model), _dequantised_bytes(model)
            counts, gathered = count_parameters(model), _largest_units(model, run, precision)
            loss_of = loss_function(model, run)
            if by_document(factors, "cuda" if on_gpu else "cpu"):
                attend_by_document(model)
            shared = _wrapped(model, run, precision)
            optimizer = optimizer_of(unwrap(shared), factors, learning_rate_ratio=ratio)
            state = TrainingState(shared, optimizer, _Scaler("cpu") if precision.scaler else None)
            seen = _two_steps(run, state, precision, batch, block_bytes, loss_of)
    collectives = seen.collectives
    if factors.strategy == "ddp" and factors.gpus > 1:
        collectives = [*collectives, *_ddp_collectives(model, factors.gpus)]
    account = Account(
        batch=batch,
        peak_bytes=seen.tracker.peak_allocated_bytes,
        peak_phase=seen.tracker.peak_phase,
        breakdown_bytes=seen.tracker.breakdown_bytes,
        phase_peak_bytes=seen.tracker.phase_peak_bytes,
        estimation_peak_bytes=estimation,
        weights_bytes=loaded,
        dequantised_bytes=dequantised,
        gathered_bytes=gathered if sharded else 0,
        total_parameters=counts.total,
        trainable_parameters=counts.trainable,
        work=seen.work,
        optimizer=seen.optimizer,
        collectives=tuple(communication_rows(collectives)),
        notes=tuple(notes),
        seconds=round(time.perf_counter() - began, 2),
    )
    return account, seen.tracker.segments


def _assembled(run: Run, config: PreTrainedConfig, num_labels: int | None, notes: list[str]) -> tuple[nn.Module, float]:
    """The model that the run's method trains, before it is spread over devices, and LoRA+'s ratio of learning rates."""
    factors, precision = run.factors, PRECISIONS[run.factors.precision]
    plain = fake.with_plain_start(run)
    if plain is not run:
        notes.append(f"the start of {run.method_name} is not modelled, what it trains is")
    with unset_fake_temporarily(), torch.device("meta"):
        model: Any = fake.base_model(run, config, num_labels=num_labels, quantization=quantization_of(run, precision))
        adapted = adapt(
            model,
            plain.method,
            task_kind=run.task_kind,
            trained_dtype=precision.trained,
            adapter_dtype=DTYPES[run.method.adapter_dtype] if isinstance(run.method, AdapterMethod) else None,
            seed=factors.seed,
            start=Start(
                batches=lambda shared: [],
                loss_function=model_loss,
                load_original=lambda: model,
                total_steps=PLANNED_STEPS,
                checkpointing=factors.gradient_checkpointing,
                planned=_uniform_plan(model, run, notes),
            ),
        )
        if factors.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fake.materialise(adapted.model)
    fake.keep_adapters(adapted.model)
    return adapted.model, adapted.learning_rate_ratio


def _uniform_plan(model: nn.Module, run: Run, notes: list[str]) -> dict[str, Any] | None:
    """What GoRA will have decided, with the reference rank everywhere; None for methods that need no data."""
    if not isinstance(run.method, GoraMethod):
        return None
    settings = gora_settings(run.method, run.factors.seed)
    if not settings.needs_gradients:
        return None
    notes.append("ranks that are decided from data are counted at the reference rank")
    shapes = gora.target_shapes(model, _targets(run.method))
    ranks = {name: min(settings.reference_rank, *shape) for name, shape in shapes.items()}
    return gora.GoraPlan(settings, run.method.route, shapes, {}, ranks, 0, 0.0, None).summary()


def _targets(method: GoraMethod) -> str | list[str]:
    return method.target_modules if isinstance(method.target_modules, str) else list(method.target_modules)


def _wrapped(model: nn.Module, run: Run, precision: Precision) -> nn.Module:
    if run.factors.strategy == "ddp":
        return fake.Buckets(model)
    return spread(model, run, World(0, run.factors.gpus, torch.device("cpu")), precision)


class _Scaler(torch.amp.GradScaler):
    """A gradient scaler that takes gradients for finite, since there are none to look at."""

    def _maybe_opt_step(self, optimizer: Any, optimizer_state: Any, *args: Any, **kwargs: Any) -> Any:
        return optimizer.step(*args, **kwargs)


def _make_optimizer_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Let an optimizer make what it keeps between steps, by one of its steps without a pass over the model."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


@dataclass(frozen=True)
class _Seen:
    tracker: SegmentedStorage
    work: Work
    optimizer: Work
    collectives: list[Collective]


def _two_steps(
    run: Run, state: TrainingState, precision: Precision, batch: BatchShape, block_bytes: int, loss_of: LossOf | None
) -> _Seen:
    """Count a step and track its memory, once the optimizer has its state.

    FSDP sets itself up in its first step, and an optimizer within the backward pass can only be run by one: there the
    first step is counted, the second tracked.
    """
    asked = run.factors.gradient_accumulation
    run_twice = min(asked, 2)  # the second micro-batch meets the gradients of the first, as all later ones do
    counter, communication = WorkCounter(), CommunicationCounter()
    micro: list[Work] = []

    def begins(step: int, phase: str) -> None:
        if step == 0 and phase == "optimizer":
            micro.append(counter.work)

    tokens = batch.rows * batch.width
    loop = Loop(
        factors=run.factors.model_copy(update={"gradient_accumulation": run_twice}),
        precision=precision,
        schedule=cast(Any, SimpleNamespace(steps=PLANNED_STEPS, epoch=lambda step: 0.0)),
        world=World(0, run.factors.gpus, torch.device("cpu")),
        label_tokens=[tokens, tokens],
        loss_of=loss_of,
        write=lambda records: None,
        window_ended=lambda state, loss: None,
        beat=begins,
    )
    batches = iter(lambda: fake.fake_batch(batch, run.task_kind), None)
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    units = transformer_blocks(unwrap(state.model))
    tracker = SegmentedStorage(state.model, state.optimizer, blocks=units, block_bytes=block_bytes)
    state.model.train()
    primed = not dist.is_initialized() and not isinstance(state.optimizer, BackwardOptimizer)
    if primed:
        _make_optimizer_state(state.optimizer, parameters)
        steps: list[tuple[tuple[Any, ...], SegmentedStorage | None]] = [((counter, tracker), tracker)]
    else:
        steps = [((counter, communication), None), ((tracker,), tracker)]
    for step, (watch, tracked) in enumerate(steps):
        clock = StepClock("cpu")
        clock.begin(step)
        with ExitStack() as stack:
            for one in watch:
                stack.enter_context(one)
            loop.take_step(state, parameters, batches, clock, step, tracked)
        clock.end()
    extra = asked / run_twice
    optimizer = counter.work - micro[0]
    collectives = [
        replace(one, calls=round(one.calls * extra), payload_bytes=round(one.payload_bytes * extra))
        if one.kind == "all_gather"  # gradients are reduced once a step, weights gathered in each micro-batch
        else one
        for one in communication.collectives
    ]
    return _Seen(tracker, micro[0].scaled(extra), optimizer, collectives)


# --- what a method computes from data before training -----------------------------------------------------


def _estimation_peak(
    run: Run, config: PreTrainedConfig, batch: BatchShape, num_labels: int | None, block_bytes: int, on_gpu: bool
) -> int | None:
    """Peak of GoRA's estimation of gradients; None for methods that estimate nothing, or whose start is not modelled.

    Gradient sums lie in main memory: on a CPU they count, beside a GPU they do not.
    """
    method, precision = run.method, PRECISIONS[run.factors.precision]
    if not isinstance(method, GoraMethod) or not gora_settings(method, run.factors.seed).needs_gradients:
        return None
    packed = quantization_of(run, precision)
    quantization = packed if method.route == "dequantised" else None
    model: Any = fake.base_model(run, config, num_labels=num_labels, quantization=quantization)
    if run.factors.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = method.estimation_batch_size or batch.rows
    shape = BatchShape(rows, batch.width, padded=batch.padded and rows > 1)
    with fake.fake_mode():
        fake.materialise(model)
        made = fake.fake_batch(shape, run.task_kind, mask_padding=True)
        tracker = track_live_storage(model, block_bytes=block_bytes)

        def loss(model: nn.Module, values: Any) -> torch.Tensor:
            with precision.autocast_context("cpu"):
                return model_loss(model, values)

        plan = gora.plan(
            model,
            [{**made.inputs, "labels": made.labels}],
            gora_settings(method, run.factors.seed),
            targets=_targets(method),
            loss_function=loss,
            route=method.route,
            tracker=tracker,
            measure=_size_of_importance,
        )
    peak = tracker.peak_allocated_bytes
    if not on_gpu:
        return peak
    beside = 0
    if packed is not None and quantization is None:  # the 4-bit model is there already
        with fake.fake_mode():
            quantised = fake.base_model(run, config, num_labels=num_labels, quantization=packed)
            fake.materialise(quantised)
            beside = weights_bytes(quantised)
    return peak - sum(4 * rows * columns for rows, columns in plan.shapes.values()) + beside


def _size_of_importance(weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """Do with tensors what GoRA's importance does, and find all modules alike; a packed weight is unpacked for it."""
    if weight.shape != gradient.shape:
        weight = torch.empty_like(gradient)
    (weight.float() * gradient.float()).abs().mean(dtype=torch.float64)
    return 1.0


# --- sizes ------------------------------------------------------------------------------------------------


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all distinct storages behind the parameters and buffers of a model, quantisation scales included."""
    tracker = track_live_storage(model)
    with tracker:
        pass
    return tracker.live_bytes


def _dequantised_bytes(model: nn.Module) -> int:
    packed = [parameter for parameter in model.parameters() if hasattr(parameter, "quant_state")]
    sizes = [logical_size(weight) * cast(Any, weight).quant_state.dtype.itemsize for weight in packed]
    return max(sizes, default=0)


def _largest_units(model: nn.Module, run: Run, precision: Precision) -> int:
    """Bytes of the two largest units of sharding, whole and in the dtype in which they travel."""
    blocks = transformer_blocks(model) if run.factors.fsdp_unit == "block" else []
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]

    def size(parameters: Any) -> int:
        itemsize = precision.autocast.itemsize if precision.autocast else None
        return sum(p.numel() * (itemsize if itemsize and p.is_floating_point() else p.itemsize) for p in parameters)

    return sum(sorted([size(rest), *(size(block.parameters()) for block in blocks)])[-2:])


def _ddp_collectives(model: nn.Module, size: int) -> list[Collective]:
    """One all-reduce per bucket: the first of 1 MiB, then 25 MiB each, as DDP cuts them by default."""
    payload = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
    calls = 1 + math.ceil(max(0, payload - FIRST_BUCKET_BYTES) / BUCKET_BYTES)
    return [Collective("all_reduce", "world", size, calls, payload)]
