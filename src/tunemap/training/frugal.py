"""Optimizers of full fine-tuning that keep less than AdamW's two moments per weight: GaLore, LOMO and AdaLomo.

GaLore (Zhao et al. 2024, https://arxiv.org/abs/2403.03507) keeps AdamW's moments of a low-rank projection of each
gradient. LOMO (Lv et al. 2023, https://arxiv.org/abs/2306.09782) is plain gradient descent that changes each weight
during the backward pass and frees its gradient at once; AdaLomo (Lv et al. 2023, https://arxiv.org/abs/2310.10195) does
the same with Adafactor's factored second moment. The arithmetic is that of the authors' packages, galore-torch and
lomo-optim; what is added here is what a run needs besides: checkpoints, gradient norms, a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tunemap.methods.parameters import linear_shapes

GALORE_SCALE = 0.25  # the authors' alpha: of the projected step, beside the learning rate
_PROJECTOR = "projector"


def galore_adamw(
    model: nn.Module, *, learning_rate: float, weight_decay: float, rank: int, update_steps: int, **adam: Any
) -> torch.optim.Optimizer:
    """AdamW over projections of rank `rank` for the linear layers of the backbone, plain AdamW for all else.

    The projection of a layer is computed anew, by a singular value decomposition, every `update_steps` steps. `adam`
    holds betas and eps.
    """
    from galore_torch import GaLoreAdamW

    parameters = dict(model.named_parameters())
    projected = [parameters[f"{name}.weight"] for name in linear_shapes(model)]
    known = {id(parameter) for parameter in projected}
    plain = [parameter for parameter in parameters.values() if parameter.requires_grad and id(parameter) not in known]
    settings = {"rank": rank, "update_proj_gap": update_steps, "scale": GALORE_SCALE, "proj_type": "std"}
    optimizer: torch.optim.Optimizer = GaLoreAdamW(
        [{"params": plain}, {"params": projected, **settings}],
        lr=learning_rate,
        weight_decay=weight_decay,
        no_deprecation_warning=True,
        **adam,
    )
    optimizer.register_state_dict_post_hook(_projectors_to_matrices)
    optimizer.register_load_state_dict_post_hook(_matrices_to_projectors)
    return optimizer


def _projectors_to_matrices(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state of tensors and numbers alone, which checkpoints hold without pickled code."""
    kept = {
        index: {name: value.ortho_matrix if name == _PROJECTOR else value for name, value in of_one.items()}
        for index, of_one in state["state"].items()
    }
    return state | {"state": kept}


def _matrices_to_projectors(optimizer: torch.optim.Optimizer) -> None:
    from galore_torch.galore_projector import GaLoreProjector

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if _PROJECTOR in state:
                projector = GaLoreProjector(
                    group["rank"],
                    update_proj_gap=group["update_proj_gap"],
                    scale=group["scale"],
                    proj_type=group["proj_type"],
                )
                projector.ortho_matrix = state[_PROJECTOR]
                state[_PROJECTOR] = projector


class BackwardOptimizer(torch.optim.Optimizer):
    """LOMO or AdaLomo: weights change in `backward`, one after the other, and `step` has nothing left to do.

    The packages' classes keep their states in dictionaries of their own, by parameter name; `state` shows the same
    tensors by parameter, as any optimizer's does. The norm of all gradients, which are never there together, is summed
    up as they come. Right on one device and for one micro-batch per step only: what other devices or micro-batches add
    to a gradient would come too late.
    """

    def __init__(self, model: nn.Module, *, name: str, learning_rate: float, weight_decay: float) -> None:
        """`name`: lomo or adalomo."""
        import lomo_optim

        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.register_post_accumulate_grad_hook(self._add_to_norm)
        if name == "lomo":
            self._package = lomo_optim.Lomo(model, lr=learning_rate, weight_decay=weight_decay)
        else:
            with _states_beside(model):
                # Scaling the loss serves fp16, which runs here under no optimizer of this kind.
                self._package = lomo_optim.AdaLomo(model, lr=learning_rate, weight_decay=weight_decay, loss_scale=None)
        super().__init__(parameters.values(), {"lr": learning_rate, "weight_decay": weight_decay})
        self._squares: list[torch.Tensor] = []
        for kind in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"):
            for parameter_name, tensor in getattr(self._package, kind, {}).items():
                self.state[parameters[parameter_name]][kind] = tensor

    def backward(self, loss: torch.Tensor) -> None:
        """The backward pass of `loss`, which leaves changed weights and no gradients."""
        self._squares = []
        self._package.fused_backward(loss, self.param_groups[0]["lr"])

    def gradient_norm(self) -> torch.Tensor:
        """Global norm of the gradients of the last backward pass."""
        return torch.stack(self._squares).sum().sqrt()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Nothing: the weights have changed in `backward`."""

    def state_dict(self) -> dict[str, Any]:
        """The factored moments by the order of parameters, and how many steps they have seen."""
        return super().state_dict() | {"steps": getattr(self._package, "step_num", 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the moments in place: the package holds the same tensors."""
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, moments in state_dict["state"].items():
            for kind, tensor in moments.items():
                self.state[mine[index]][kind].copy_(tensor)
        self._package.step_num = state_dict["steps"]

    def _add_to_norm(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._squares.append(parameter.grad.float().square().sum())


@contextmanager
def _states_beside(model: nn.Module) -> Iterator[None]:
    """AdaLomo puts its states on the current CUDA device, wherever the model is: inside, they stay with a CPU model."""
    if next(model.parameters()).device.type == "cuda":
        yield
        return
    original = torch.Tensor.cuda
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]
