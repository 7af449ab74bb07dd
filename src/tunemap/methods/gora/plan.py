"""Everything that GoRA decides before training: gradients, importances, and the ranks that follow."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunemap.errors import UserError
from tunemap.methods.gora.gradients import mean_gradients, refuse_unsuitable
from tunemap.methods.gora.ranks import allocate_ranks, frobenius_importance, importance
from tunemap.methods.gora.settings import ROUTES, GoraSettings
from tunemap.methods.parameters import Shape, linear_shapes, lora_closed_form
from tunemap.methods.undisturbed import Batch, LossFunction, model_loss


class PeakTracker(Protocol):
    """A context that knows the peak of live tensor memory while it was open, such as `measure.memory.LiveStorage`."""

    @property
    def peak_allocated_bytes(self) -> int: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...


@dataclass(frozen=True)
class GoraPlan:
    """Everything decided before training: an artefact of the run, and what `attach` needs.

    shapes:      (out_features, in_features) per adapted module, by full name in the base model.
    importances: per module; empty where the method needs no gradients.
    ranks:       per module.
    budget:      trainable parameters of LoRA at the reference rank; `trainable` is what the ranks really cost.
    gradients:   mean fp32 gradient per module (out x in) on the buffer device; None once released or where B = 0.
    batch_count: estimation batches, summed over processes.
    estimation_s: wall seconds of the estimation, apart from training; 0 where there was none.
    estimation_peak_bytes: peak tensor memory of the estimation, None where it was not measured.
    """

    settings: GoraSettings
    route: str
    shapes: dict[str, Shape]
    importances: dict[str, float]
    ranks: dict[str, int]
    batch_count: int
    estimation_s: float
    estimation_peak_bytes: int | None
    gradients: dict[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def budget(self) -> int:
        return lora_closed_form(self.shapes, self.settings.reference_rank)

    @property
    def trainable(self) -> int:
        return lora_closed_form(self.shapes, self.ranks)

    def released(self) -> Self:
        """The same plan without the gradients (4 bytes per target weight), for the time after `apply`."""
        return replace(self, gradients=None)

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any]) -> Self:
        """The plan of a `summary`, gradients released: enough for a resumed run to rebuild its adapters' shapes."""
        modules = summary["modules"]
        return cls(
            settings=GoraSettings(**summary["settings"]),
            route=summary["route"],
            shapes={name: (module["shape"][0], module["shape"][1]) for name, module in modules.items()},
            importances={n: m["importance"] for n, m in modules.items() if m["importance"] is not None},
            ranks={name: module["rank"] for name, module in modules.items()},
            batch_count=summary["batch_count"],
            estimation_s=summary["estimation_s"],
            estimation_peak_bytes=summary["estimation_peak_bytes"],
        )

    def summary(self) -> dict[str, Any]:
        """JSON-serialisable record: settings, ranks, importances, real against reference parameter count, cost."""
        return {
            "settings": asdict(self.settings),
            "route": self.route,
            "modules": {
                name: {
                    "shape": list(shape),
                    "rank": self.ranks[name],
                    "importance": self.importances.get(name),
                }
                for name, shape in self.shapes.items()
            },
            "budget": self.budget,
            "trainable": self.trainable,
            "trainable_to_budget": self.trainable / self.budget,
            "batch_count": self.batch_count,
            "estimation_s": self.estimation_s,
            "estimation_peak_bytes": self.estimation_peak_bytes,
        }


def plan(
    model: nn.Module,
    batches: Iterable[Batch],
    settings: GoraSettings,
    *,
    targets: Collection[str] | str | None = None,
    loss_function: LossFunction = model_loss,
    route: str = "unquantised",
    buffer_device: torch.device | str = "cpu",
    tracker: PeakTracker | None = None,
    measure: Callable[[torch.Tensor, torch.Tensor], float] | None = None,
) -> GoraPlan:
    """Estimate gradients of the bare `model` and turn them into ranks; the model is left exactly as it was.

    `batches` are keyword arguments of the loss function, on the model's device; all of them are used (the paper takes
    64, the released scripts 32 a process). The loss must be a mean per label token and not divided by gradient
    accumulation: B is proportional to its gradient. `targets` are module names or their endings (None or "all-linear":
    every linear layer of the backbone). Every process of a group calls this with its own batches and the unwrapped,
    unsharded model; all of them return the same plan.
    The gradient buffers take 4 bytes per target weight on `buffer_device`; besides them at most one layer's gradient
    exists at a time. `tracker` measures peak memory; without it CUDA's own counter does (and is reset), on CPU nothing.
    `measure` gives the importance of (weight, gradient) in place of the settings': a planner's tensors have no values.
    """
    shapes = target_shapes(model, targets)
    if route not in ROUTES:
        raise UserError(f"gora: route is {route!r}; allowed: {', '.join(ROUTES)}")
    if not settings.needs_gradients:
        ranks = _allocate({}, shapes, settings)
        return GoraPlan(settings, route, shapes, {}, ranks, 0, 0.0, None)
    device = next(model.parameters()).device
    refuse_unsuitable(model, shapes, route)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with tracker or nullcontext():
        gradients, batch_count = mean_gradients(
            model, batches, list(shapes), settings.seed, loss_function, route, torch.device(buffer_device)
        )
        measure = measure or (importance if settings.importance == "mean" else frobenius_importance)
        importances = {
            name: _measured(measure, dequantize_module_weight(model.get_submodule(name)), gradient)
            for name, gradient in gradients.items()
        }
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return GoraPlan(
        settings=settings,
        route=route,
        shapes=shapes,
        importances=importances,
        ranks=_allocate(importances, shapes, settings),
        batch_count=batch_count,
        estimation_s=time.perf_counter() - start,
        estimation_peak_bytes=_peak_bytes(tracker, device),
        gradients=gradients if settings.initialisation == "compress" else None,
    )


def target_shapes(model: nn.Module, targets: Collection[str] | str | None = None) -> dict[str, Shape]:
    """(out, in) of the linear backbone layers named by `targets` (full names or endings), in model order."""
    shapes = linear_shapes(model)
    if any(isinstance(model.get_submodule(name), Conv1D) for name in shapes):
        raise UserError("gora: this model's layers keep their weights transposed (Conv1D, as in GPT-2); use kind lora")
    if targets is None or targets == "all-linear":
        return shapes
    wanted = [targets] if isinstance(targets, str) else list(targets)
    missing = [t for t in wanted if not any(_ends_with(name, t) for name in shapes)]
    if missing or not wanted:
        endings = sorted({name.rsplit(".", 1)[-1] for name in shapes})
        raise UserError(
            f"targets: no linear layer of the backbone is called {', '.join(missing) or '(empty list)'}; "
            f"allowed: all-linear, {', '.join(endings)}"
        )
    return {name: shape for name, shape in shapes.items() if any(_ends_with(name, t) for t in wanted)}


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _measured(
    measure: Callable[[torch.Tensor, torch.Tensor], float], weight: torch.Tensor, gradient: torch.Tensor
) -> float:
    """Where the weight lives: one layer's gradient at a time goes to the device."""
    return measure(weight.detach(), gradient.to(weight.device))


def _allocate(importances: Mapping[str, float], shapes: Mapping[str, Shape], settings: GoraSettings) -> dict[str, int]:
    return allocate_ranks(
        importances,
        shapes,
        reference_rank=settings.reference_rank,
        min_rank=settings.min_rank,
        max_rank=settings.max_rank,
        preset=settings.allocation,
    )


def _peak_bytes(tracker: PeakTracker | None, device: torch.device) -> int | None:
    if tracker is not None:
        return tracker.peak_allocated_bytes
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
