"""GoRA on ordinary PEFT LoRA layers: ranks and a warm start from the loss gradient, and the controls beside it.

GoRA (He et al., NeurIPS 2025, https://arxiv.org/abs/2502.12171) differs from LoRA in four ways: a rank per module from
the importance of its weights, B started at a compressed gradient step, the scaling alpha / sqrt(rank) of rsLoRA, and
LoRA+ learning rates. `METHODS` names every combination that a fair comparison needs; all of them run through the same
functions and the same PEFT layer class, so that nothing else differs:

    made = plan(base_model, batches, method("gora"))      # a few forward and backward passes, no weight changes
    peft_model = attach(base_model, made, task_type="CAUSAL_LM")

The adapters save, load and merge as plain LoRA. Shapes follow torch: W and G are out x in, A is rank x in, B is
out x rank (the paper writes the transposes: its m is in_features).
"""

import hashlib
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from tunemap.errors import UserError
from tunemap.methods.parameters import heads_to_save, is_quantised, linear_shapes, lora_closed_form

Shape = tuple[int, int]  # (out_features, in_features)
Batch = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Batch], torch.Tensor]


# --- what a method is -------------------------------------------------------------------------------------------------

ALLOCATIONS = {
    "paper": "feature sqrt(in + out), nearest rank: the paper's text; the parameter count moves by up to half",
    "official_scripts": "feature in + out, rank rounded down: what the released scripts run",
    "exact_budget": "feature in + out, remainders handed out until no module fits: LoRA's count, for fair timings",
    "uniform": "the reference rank everywhere",
}
INITIALISATIONS = {
    "compress": "A uniform, B the compressed negative gradient: GoRA's warm start",
    "zeros": "A uniform, B = 0: LoRA's start",
    "weight_svd": "leading singular vectors of W moved from W into the adapter: PiSSA, what the published study ran",
}
IMPORTANCES = {
    "mean": "mean |W o G| over elements: the paper's, free of the module's size",
    "frobenius": "Frobenius norm of W o G: grows with the module's size; what the published study ran",
}
ROUTES = {
    "unquantised": "weight gradients of the unquantised model; over a 4-bit base, plan first and quantise afterwards "
    "(the authors' QGoRA)",
    "dequantised": "output gradients x inputs, with weights dequantised for the importance; works on the 4-bit model "
    "itself and keeps QLoRA's memory (ours)",
}


@dataclass(frozen=True)
class GoraSettings:
    """One member of the GoRA ladder; the defaults are the paper's for language models.

    reference_rank: rank of the LoRA whose parameter count is the budget.
    alpha:          LoRA alpha; scaling is alpha / sqrt(own rank), or alpha / reference_rank without `rank_stabilised`.
    min_rank, max_rank: bounds of a module's rank; min(in, out) bounds it in any case; None means no other bound.
    gamma:          norm of the first step relative to the gradient's, used by `compress` only (the paper: 0.05, and
                    0.08 for MetaMathQA to GSM8K).
    learning_rate_ratio: LoRA+ ratio of B's learning rate to A's; 1 is plain.
    seed:           of every module's A and of the random numbers drawn while gradients are estimated.
    """

    allocation: str = "paper"
    initialisation: str = "compress"
    importance: str = "mean"
    reference_rank: int = 8
    alpha: float = 16.0
    min_rank: int = 4
    max_rank: int | None = 32
    gamma: float = 0.05
    rank_stabilised: bool = True
    learning_rate_ratio: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, allowed in (
            ("allocation", ALLOCATIONS),
            ("initialisation", INITIALISATIONS),
            ("importance", IMPORTANCES),
        ):
            if getattr(self, key) not in allowed:
                raise UserError(f"gora: {key} is {getattr(self, key)!r}; allowed: {', '.join(allowed)}")
        if not 1 <= self.min_rank <= self.reference_rank <= (self.max_rank or self.reference_rank):
            raise UserError(
                f"gora: needs 1 <= min_rank <= reference_rank <= max_rank, got min_rank {self.min_rank}, "
                f"reference_rank {self.reference_rank}, max_rank {self.max_rank}"
            )
        if self.alpha <= 0 or self.gamma < 0 or self.learning_rate_ratio <= 0:
            raise UserError(
                f"gora: alpha and learning_rate_ratio must be positive and gamma not negative, got alpha {self.alpha}, "
                f"learning_rate_ratio {self.learning_rate_ratio}, gamma {self.gamma}"
            )
        if self.initialisation == "compress" and not self.rank_stabilised:
            raise UserError("gora: initialisation compress assumes the scaling alpha / sqrt(rank); set rank_stabilised")

    @property
    def needs_gradients(self) -> bool:
        """Whether planning runs the model; plain LoRA and its scalings do not."""
        return self.allocation != "uniform" or self.initialisation == "compress"


_LORA = GoraSettings(allocation="uniform", initialisation="zeros", rank_stabilised=False, learning_rate_ratio=1.0)

METHODS: dict[str, GoraSettings] = {
    "lora": _LORA,
    "rslora": replace(_LORA, rank_stabilised=True),
    "lora+": replace(_LORA, learning_rate_ratio=16.0),
    "rslora+lora+": replace(_LORA, rank_stabilised=True, learning_rate_ratio=16.0),
    "gora": GoraSettings(),
    "gora_official_scripts": GoraSettings(allocation="official_scripts"),
    "gora_exact_budget": GoraSettings(allocation="exact_budget"),
    "gora_ranks_only": GoraSettings(initialisation="zeros"),
    "gora_init_only": GoraSettings(allocation="uniform"),
    # What the published study ran under the name of GoRA: the official parser's defaults, which are PiSSA with
    # size-biased ranks. It also kept adapters in bf16 (its LoRA baseline had fp32) and used 8 estimation batches of 8.
    "gora_hpml": GoraSettings(
        allocation="official_scripts",
        initialisation="weight_svd",
        importance="frobenius",
        reference_rank=16,
        alpha=32.0,
        min_rank=1,
        max_rank=None,
        rank_stabilised=False,
        learning_rate_ratio=1.0,
    ),
}


def method(name: str, **changes: Any) -> GoraSettings:
    """The settings called `name` ("-" and "_" are the same), with some of them changed; UserError if unknown."""
    key = name.replace("-", "_").lower()
    if key not in METHODS:
        raise UserError(f"no method {name!r}; the GoRA ladder has {', '.join(METHODS)}")
    unknown = changes.keys() - asdict(METHODS[key]).keys()
    if unknown:
        raise UserError(
            f"{name}: unknown setting {', '.join(sorted(unknown))}; allowed: {', '.join(asdict(METHODS[key]))}"
        )
    return replace(METHODS[key], **changes)


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def importance(weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """Mean of |W o G| over elements; both out x in. Size-free, and unchanged by W -> cW, G -> G/c."""
    return float((weight.float() * gradient.float()).abs().mean(dtype=torch.float64))


def frobenius_importance(weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """Frobenius norm of W o G; both out x in. Grows with the module's size: for `gora_hpml` only."""
    return float((weight.float() * gradient.float()).double().norm())


def allocate_ranks(
    importances: Mapping[str, float],
    shapes: Mapping[str, Shape],
    *,
    reference_rank: int,
    min_rank: int,
    max_rank: int | None,
    preset: str,
) -> dict[str, int]:
    """A rank per module, from its share a = I / sum(I) of the importance.

    With the feature f (see `ALLOCATIONS`) and the budget b = sum(f) x reference_rank, the rank is b a / f, rounded and
    clipped to [min_rank, max_rank] and to min(in, out). `shapes` gives (out, in). Invariant to a common factor of the
    importances, so to the scale of the loss. UserError where the importances say nothing (all zero, not finite).
    """
    if preset not in ALLOCATIONS:
        raise UserError(f"gora: allocation is {preset!r}; allowed: {', '.join(ALLOCATIONS)}")
    bounds = {name: _rank_bounds(shape, min_rank, max_rank) for name, shape in shapes.items()}
    if preset == "uniform":
        return {name: min(reference_rank, min(shapes[name])) for name in shapes}
    shares = _shares({name: importances[name] for name in shapes})
    if preset == "exact_budget":
        return _exact_budget_ranks(shares, shapes, bounds, reference_rank)
    if preset == "paper":
        features = {name: math.sqrt(rows + columns) for name, (rows, columns) in shapes.items()}
        budget = sum(features.values()) * reference_rank
        # Nine digits first, for the same reason: a half must round alike at every scale.
        raw = {name: round(round(budget * shares[name] / features[name], 9)) for name in shapes}
    else:
        sizes = {name: rows + columns for name, (rows, columns) in shapes.items()}
        total = sum(sizes.values()) * reference_rank
        # The released code rounds the module's part of the budget to whole parameters, then divides with rest.
        raw = {name: round(total * shares[name]) // sizes[name] for name in shapes}
    return {name: min(max(raw[name], low), high) for name, (low, high) in bounds.items()}


def initial_a(shape: Shape, rank: int, generator: torch.Generator) -> torch.Tensor:
    """A (rank x in, fp32) uniform in +-1/sqrt(in) for a module of `shape` (out, in): also PEFT's own default."""
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(rank, shape[1], dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def initial_b(gradient: torch.Tensor, a: torch.Tensor, *, alpha: float, gamma: float) -> torch.Tensor:
    """B (out x rank, fp32) = -(gamma sqrt(in) / alpha) G A^T (A A^T)^-1, from G (out x in) and A (rank x in).

    Under the scaling alpha / sqrt(rank) the adapter then adds dW = -gamma sqrt(in / rank) G P, with P the projector on
    the rows of A: one step of gradient descent, compressed, of norm about gamma |G|. The minus sign is what makes it
    descend (paper, eq. 8-10; the released code lost it in August 2025).
    """
    g, a = gradient.float(), a.float()
    # The small rank x rank system in double: fp32 would lose digits to the condition number of A A^T.
    solved = torch.linalg.solve((a @ a.T).double(), (a @ g.T).double())
    return (solved.T * (-gamma * math.sqrt(a.shape[1]) / alpha)).to(torch.float32).contiguous()


def module_generator(seed: int, name: str) -> torch.Generator:
    """The random stream of one module's A: independent of other modules, of their order and of the world size."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(digest ^ seed)


def sample_indices(
    example_count: int, *, batch_count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Examples for each estimation batch of one process, drawn without replacement by a generator of their own.

    A sampler apart from training's leaves the training order untouched. The batches of all processes together are the
    batches of one process with `batch_count * world_size`.
    """
    needed = batch_count * batch_size * world_size
    if needed > example_count:
        raise UserError(
            f"gora: estimation wants {needed} examples ({world_size} processes x {batch_count} batches x "
            f"{batch_size}), "
            f"the data set has {example_count}"
        )
    order = torch.randperm(example_count, generator=torch.Generator().manual_seed(seed))[:needed].tolist()
    batches = [order[start : start + batch_size] for start in range(0, needed, batch_size)]
    return batches[rank::world_size]


def _rank_bounds(shape: Shape, min_rank: int, max_rank: int | None) -> tuple[int, int]:
    high = min(shape) if max_rank is None else min(max_rank, *shape)
    return min(min_rank, high), high


def _shares(importances: Mapping[str, float]) -> dict[str, float]:
    bad = [name for name, value in importances.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"gora: the importance of {bad[0]} is {importances[bad[0]]}; the estimated gradient is not finite"
        )
    total = math.fsum(importances.values())
    if total <= 0:
        raise UserError(
            "gora: every importance is zero, so they allocate no ranks; does the loss depend on the targets?"
        )
    # Twelve digits: the last bits change with the scale of the loss and must not decide between equals.
    return {name: float(f"{value / total:.12g}") for name, value in importances.items()}


def _exact_budget_ranks(
    shares: Mapping[str, float],
    shapes: Mapping[str, Shape],
    bounds: Mapping[str, tuple[int, int]],
    reference_rank: int,
) -> dict[str, int]:
    """Ranks whose parameter count misses LoRA's by less than one rank of the smallest module below its bound."""
    sizes = {name: rows + columns for name, (rows, columns) in shapes.items()}
    budget = sum(sizes.values()) * reference_rank
    ideal = _ranks_that_spend(budget, {name: shares[name] / sizes[name] for name in shapes}, sizes, bounds)
    ranks = {name: max(math.floor(round(ideal[name], 9)), bounds[name][0]) for name in shapes}
    left = budget - sum(ranks[name] * sizes[name] for name in shapes)
    while True:
        fitting = [name for name in shapes if sizes[name] <= left and ranks[name] < bounds[name][1]]
        if not fitting:
            return ranks
        neediest = max(fitting, key=lambda name: (round(ideal[name] - ranks[name], 9), shares[name]))
        ranks[neediest] += 1
        left -= sizes[neediest]


def _ranks_that_spend(
    budget: int,
    slopes: Mapping[str, float],
    sizes: Mapping[str, int],
    bounds: Mapping[str, tuple[int, int]],
) -> dict[str, float]:
    """Real-valued clip(c x slope, bounds) for the one c that spends the budget, by bisection (monotone in c)."""

    def ranks_at(c: float) -> dict[str, float]:
        return {name: min(max(c * slopes[name], float(low)), float(high)) for name, (low, high) in bounds.items()}

    def spent(c: float) -> float:
        return sum(rank * sizes[name] for name, rank in ranks_at(c).items())

    positive = [slope for slope in slopes.values() if slope > 0]
    lower, upper = 0.0, max(high for _, high in bounds.values()) / min(positive)
    for _ in range(200):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if spent(middle) < budget else (lower, middle)
    return ranks_at(upper)


# --- gradients --------------------------------------------------------------------------------------------------------


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


def model_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss that a transformers model computes from its own `labels`: the mean over the batch's label tokens."""
    return model(**batch).loss


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
    _refuse_unsuitable(model, shapes, route)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with tracker or nullcontext():
        gradients, batch_count = _mean_gradients(
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


def _measured(
    measure: Callable[[torch.Tensor, torch.Tensor], float], weight: torch.Tensor, gradient: torch.Tensor
) -> float:
    """Where the weight lives: one layer's gradient at a time goes to the device."""
    return measure(weight.detach(), gradient.to(weight.device))


def target_shapes(model: nn.Module, targets: Collection[str] | str | None = None) -> dict[str, Shape]:
    """(out, in) of the linear backbone layers named by `targets` (full names or endings), in model order."""
    shapes = linear_shapes(model)
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


def _refuse_unsuitable(model: nn.Module, names: Iterable[str], route: str) -> None:
    """Stop before the passes where the gradient would be impossible, partial or synchronised behind our back."""
    if hasattr(model, "peft_config"):
        raise UserError("gora: the model already has adapters; plan on the base model, then attach")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UserError("gora: the model is wrapped for data parallelism; plan on the bare model before wrapping it")
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UserError("gora: the model is sharded; plan on the whole model before sharding it")
    owners: dict[int, str] = {}
    for name in names:
        weight = _weight(model, name)
        if route == "unquantised" and is_quantised(weight):
            raise UserError(
                f"gora: {name} holds quantised weights ({weight.dtype}), which have no gradient; either plan on the "
                f"unquantised model and quantise afterwards (route unquantised), or plan with route dequantised"
            )
        first = owners.setdefault(id(weight), name)
        if first != name:
            raise UserError(f"gora: {first} and {name} share one weight; leave one of them out of targets")


def _mean_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    names: list[str],
    seed: int,
    loss_function: LossFunction,
    route: str,
    buffer_device: torch.device,
) -> tuple[dict[str, torch.Tensor], int]:
    """Mean fp32 gradient per module over the batches of all processes, and how many batches that were."""
    sums = {
        name: torch.zeros(shape, dtype=torch.float32, device=buffer_device)
        for name, shape in linear_shapes(model).items()
        if name in set(names)
    }
    device = next(model.parameters()).device
    seen: set[str] = set()

    def add(name: str, gradient: torch.Tensor) -> None:
        sums[name] += gradient.detach().to(buffer_device, torch.float32)
        seen.add(name)

    batch_count = 0
    with undisturbed(model), own_random_stream(device, seed), ExitStack() as hooks:
        model.requires_grad_(False)
        model.train()
        for handle in _hooks(model, names, route, add):
            hooks.callback(handle.remove)
        for batch in batches:
            seen.clear()
            loss_function(model, batch).backward()
            batch_count += 1
            missing = [name for name in names if name not in seen]
            if missing:
                raise UserError(
                    f"gora: batch {batch_count} gave {missing[0]} no gradient ({len(missing)} such modules); "
                    f"leave modules that the loss does not use out of targets"
                )
    if batch_count == 0:
        raise UserError("gora: estimating gradients needs at least one batch, got none")
    batch_count = _sum_over_processes(sums, batch_count, device)
    for total in sums.values():
        total /= batch_count
    return sums, batch_count


def _hooks(
    model: nn.Module, names: Iterable[str], route: str, add: Callable[[str, torch.Tensor], None]
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Install what hands each target's gradient to `add` and frees it; yields the handles that undo it."""
    # Reentrant checkpointing drops gradients unless some input of a block requires one; so does a 4-bit base.
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is not None:
        yield embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    for name in names:
        if route == "unquantised":
            weight = _weight(model, name)
            weight.requires_grad_(True)
            yield weight.register_post_accumulate_grad_hook(_take_weight_gradient(name, add))
        else:
            yield model.get_submodule(name).register_forward_hook(_take_outer_product(name, add))


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


def _take_weight_gradient(name: str, add: Callable[[str, torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    # After accumulation, unlike a hook on the tensor, so the layer that backward reaches last is not one batch short.
    def hook(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        add(name, weight.grad)
        weight.grad = None

    return hook


def _take_outer_product(
    name: str, add: Callable[[str, torch.Tensor], None]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    """dL/dW = sum over tokens of dy x^T, for weights that cannot hold a gradient; x stays alive until backward."""

    def forward_hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not torch.is_grad_enabled():  # a forward pass that no gradient will come back through
            return
        x = inputs[0].detach()
        if not output.requires_grad:
            output.requires_grad_(True)
        output.register_hook(lambda dy: add(name, dy.flatten(0, -2).float().T @ x.flatten(0, -2).float()))

    return forward_hook


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put requires_grad, gradients and train/eval flags back as they were: embeddings and norms must stay frozen."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modules = [(module, module.training) for module in model.modules()]
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, training in modules:
            module.training = training


@contextmanager
def own_random_stream(device: torch.device, seed: int) -> Iterator[None]:
    """Seeded randomness inside, the caller's stream untouched: training draws the same numbers as without GoRA."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _sum_over_processes(sums: Mapping[str, torch.Tensor], batch_count: int, device: torch.device) -> int:
    """Add the buffers of all processes in place, one module on the device at a time; returns all their batches."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return batch_count
    count = torch.tensor(batch_count, device=device)
    dist.all_reduce(count)
    for total in sums.values():
        moved = total.to(device)
        dist.all_reduce(moved)
        total.copy_(moved)
    return int(count)


# --- adapters ---------------------------------------------------------------------------------------------------------


def lora_config(made: GoraPlan, *, task_type: str | None = None, **parameters: Any) -> LoraConfig:
    """The ordinary LoraConfig of a plan; `parameters` adds LoRA's own (dropout, modules_to_save, ...)."""
    settings = made.settings
    reference = settings.reference_rank
    # Anchored and escaped, since PEFT reads these keys as regular expressions that may match an ending.
    changed = {f"^{re.escape(name)}": rank for name, rank in made.ranks.items() if rank != reference}
    # Without rank stabilisation one scaling alpha / reference_rank holds for every module, as in the released code.
    alphas = {} if settings.rank_stabilised else {k: settings.alpha * r / reference for k, r in changed.items()}
    return LoraConfig(
        r=reference,
        # Readers of adapter_config.json expect the integer that LoRA's alpha nearly always is.
        lora_alpha=int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha,
        use_rslora=settings.rank_stabilised,
        rank_pattern=changed,
        alpha_pattern=alphas,
        target_modules=list(made.shapes),
        # Kept in the saved adapter: `pissa` repeats its exact SVD on loading, everything else is plain LoRA.
        init_lora_weights="pissa" if settings.initialisation == "weight_svd" else True,
        task_type=task_type,
        **parameters,
    )


def apply(peft_model: Any, made: GoraPlan, *, adapter_name: str = "default") -> None:
    """Write the initial A and B into the LoRA layers of a PEFT model that was built from `lora_config(made)`.

    The base may have been quantised since the plan was made. Base weights are not touched (`weight_svd` moved its part
    of them when PEFT built the layers). UserError where modules or ranks are not the plan's.
    """
    layers = {n: m for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    if ranks != made.ranks:
        wrong = sorted(n for n in ranks.keys() | made.ranks.keys() if ranks.get(n) != made.ranks.get(n))
        raise UserError(
            f"gora: the adapter is not the plan's: {wrong[0]} has rank {ranks.get(wrong[0])}, planned is "
            f"{made.ranks.get(wrong[0])} ({len(wrong)} such modules)"
        )
    settings = made.settings
    if settings.initialisation == "weight_svd":
        return
    if settings.initialisation == "compress" and made.gradients is None:
        raise UserError("gora: the plan's gradients were released; plan again to initialise B from them")
    with torch.no_grad():
        for name, layer in layers.items():
            a = initial_a(made.shapes[name], made.ranks[name], module_generator(settings.seed, name))
            layer.lora_A[adapter_name].weight.copy_(a)
            b_weight = layer.lora_B[adapter_name].weight
            if settings.initialisation == "compress":
                assert made.gradients is not None
                g = made.gradients[name].to(b_weight.device)
                b_weight.copy_(initial_b(g, a.to(b_weight.device), alpha=settings.alpha, gamma=settings.gamma))
            else:
                b_weight.zero_()


def attach(
    model: nn.Module,
    made: GoraPlan,
    *,
    task_type: str | None = None,
    autocast_adapter_dtype: bool = True,
    initialise: bool = True,
    **parameters: Any,
) -> Any:
    """The PEFT model of a plan, initialised; draws nothing from the caller's random stream, whatever the ranks.

    `parameters` are LoRA's own; for SEQ_CLS the classification heads are trained in full unless they say otherwise.
    `autocast_adapter_dtype` keeps adapters in fp32 over a half-precision base. Without `initialise`, A and B are left
    to a checkpoint: a plan without gradients is then enough. UserError for `weight_svd` over 4-bit weights, from which
    nothing can be moved.
    """
    quantised = [n for n in made.shapes if is_quantised(_weight(model, n))]
    if quantised and made.settings.initialisation == "weight_svd":
        raise UserError(
            f"gora: initialisation weight_svd changes the base weights, but {quantised[0]} is quantised; "
            f"attach before quantising, or choose compress or zeros"
        )
    if task_type == "SEQ_CLS":
        parameters = {"modules_to_save": heads_to_save(model), **parameters}
    with own_random_stream(next(model.parameters()).device, made.settings.seed):
        config = lora_config(made, task_type=task_type, **parameters)
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
        if initialise:
            apply(peft_model, made)
    return peft_model
