"""The mean loss gradient of each target layer, one layer's gradient alive at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import nn

from tunemap.errors import UserError
from tunemap.methods.parameters import is_quantised, linear_shapes
from tunemap.methods.undisturbed import Batch, LossFunction, own_random_stream, undisturbed


def mean_gradients(
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


def refuse_unsuitable(model: nn.Module, names: Iterable[str], route: str) -> None:
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


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


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
