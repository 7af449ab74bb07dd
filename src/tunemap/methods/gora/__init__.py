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

from tunemap.methods.gora.adapters import apply, attach, lora_config
from tunemap.methods.gora.plan import GoraPlan, PeakTracker, plan, target_shapes
from tunemap.methods.gora.ranks import allocate_ranks, frobenius_importance, importance
from tunemap.methods.gora.settings import (
    ALLOCATIONS,
    IMPORTANCES,
    INITIALISATIONS,
    METHODS,
    ROUTES,
    GoraSettings,
    method,
)
from tunemap.methods.gora.start import initial_a, initial_b, module_generator

__all__ = [
    "ALLOCATIONS",
    "IMPORTANCES",
    "INITIALISATIONS",
    "METHODS",
    "ROUTES",
    "GoraPlan",
    "GoraSettings",
    "PeakTracker",
    "allocate_ranks",
    "apply",
    "attach",
    "frobenius_importance",
    "importance",
    "initial_a",
    "initial_b",
    "lora_config",
    "method",
    "module_generator",
    "plan",
    "target_shapes",
]
