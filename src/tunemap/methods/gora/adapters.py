"""A plan's adapters: ordinary LoRA layers of PEFT with the plan's ranks and start."""

import re
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from tunemap.errors import UserError
from tunemap.methods.gora.plan import GoraPlan
from tunemap.methods.gora.start import initial_a, initial_b, module_generator
from tunemap.methods.parameters import heads_to_save, is_quantised
from tunemap.methods.undisturbed import own_random_stream


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
    quantised = [n for n in made.shapes if is_quantised(model.get_parameter(f"{n}.weight"))]
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
