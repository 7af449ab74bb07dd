"""The methods of peft that train here by name, with what each trains and its defaults; and the others with the reason.

Names are peft's types plus the variants of LoRA that peft reaches through `LoraConfig`. A test holds the two tables
against peft's registry.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import EvaConfig

from tunemap.errors import UserError
from tunemap.methods.parameters import Shape


@dataclass(frozen=True)
class Fit:
    """What defaults may depend on: the parameters so far, the adapted linear shapes, the task, the training length."""

    given: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    task_type: str
    total_steps: int | None

    def divisor(self, limit: int) -> int:
        """The largest number up to `limit` that divides every side of every adapted weight."""
        common = math.gcd(*(side for shape in self.shapes.values() for side in shape))
        return max(d for d in range(1, min(limit, common) + 1) if common % d == 0) if common else limit

    def smallest(self, measure: Callable[[int, int], int], limit: int) -> int:
        """The least of `measure(out, in)` over the adapted weights, at most `limit`."""
        return max(1, min([limit, *(measure(rows, columns) for rows, columns in self.shapes.values())]))


@dataclass(frozen=True)
class PeftMethod:
    """How one PEFT type, or one variant of LoRA, is used here.

    summary:     what is trained, in one line.
    peft_type:   the type in PEFT's registry.
    defaults:    parameters that differ from PEFT's own defaults.
    fitted:      further defaults that depend on the model.
    targets:     default target modules: every linear layer of the backbone, its norms, or PEFT's own choice.
    required:    parameters without a sensible default.
    model_types: architectures that PEFT implements it for; empty means any.
    tasks:       task types that it trains on.
    per_model_type: defaults for an architecture that PEFT's own tables lack.
    hides_padding: whether the model gets embeddings in place of tokens, among which it cannot tell padding.
    """

    summary: str
    peft_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fitted: Callable[[Fit], dict[str, Any]] = lambda fit: {}
    targets: str = "linear"
    required: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("CAUSAL_LM", "SEQ_CLS")
    per_model_type: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hides_padding: bool = False


def _schedule(fit: Fit) -> dict[str, Any]:
    """AdaLoRA's budget: full rank for a tenth of training, final ranks for the last half, as in the paper's tasks."""
    if "total_step" not in fit.given and fit.total_steps is None:
        raise UserError("method ADALORA: the rank schedule needs total_step, the number of optimizer steps")
    steps = fit.given.get("total_step", fit.total_steps)
    return {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 2, "deltaT": max(1, steps // 100)}


def _alpha_like_rank(fit: Fit) -> dict[str, Any]:
    """Scaling 1 for starts that move a part of W into the adapter, so that its authors' learning rates hold."""
    return {"lora_alpha": fit.given.get("r", 16)}


_LORA = {"r": 16, "lora_alpha": 32}
_PROMPT = {"num_virtual_tokens": 20}
# Prefixes enter through the key-value cache, which encoders such as DistilBERT do not have.
_CAUSAL = ("CAUSAL_LM",)

SUPPORTED: dict[str, PeftMethod] = {
    # LoRA and what PEFT reaches through LoraConfig
    "LORA": PeftMethod("low-rank update of each linear layer", "LORA", _LORA),
    "RSLORA": PeftMethod("LoRA with the scaling alpha / sqrt(r)", "LORA", _LORA | {"use_rslora": True}),
    "DORA": PeftMethod("LoRA on the direction, and a magnitude per column", "LORA", _LORA | {"use_dora": True}),
    "PISSA": PeftMethod(
        "LoRA started at W's leading singular vectors, W keeps the rest",
        "LORA",
        {"r": 16, "init_lora_weights": "pissa"},
        _alpha_like_rank,
    ),
    "OLORA": PeftMethod(
        "LoRA started at W's QR factors, W keeps the rest",
        "LORA",
        {"r": 16, "init_lora_weights": "olora"},
        _alpha_like_rank,
    ),
    "EVA": PeftMethod(
        "LoRA started at the inputs' principal directions, ranks by explained variance; needs batches",
        "LORA",
        _LORA | {"init_lora_weights": "eva"},
        # Labels mask tokens in language models only; a classifier's labels have another shape.
        lambda fit: {"eva_config": EvaConfig(use_label_mask=fit.task_type == "CAUSAL_LM")},
    ),
    "LORA_GA": PeftMethod(
        "LoRA started at the gradient's singular vectors, W keeps the rest; needs batches",
        "LORA",
        {"r": 8, "lora_alpha": 16, "use_rslora": True, "init_lora_weights": "lora_ga", "lora_ga_config": {}},
    ),
    "CORDA": PeftMethod(
        "LoRA started at directions weighted by the inputs' covariance, W keeps the rest; needs batches",
        "LORA",
        {"r": 16, "init_lora_weights": "corda", "corda_config": {}},
        _alpha_like_rank,
    ),
    "LOFTQ": PeftMethod(
        "LoRA started at what 4-bit rounding lost, one iteration; needs a 4-bit model and the original weights",
        "LORA",
        {"r": 16, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 1}},
        _alpha_like_rank,
    ),
    # low-rank relatives
    "ADALORA": PeftMethod(
        "low-rank update whose ranks shrink where they matter least; needs `after_optimizer_step`",
        "ADALORA",
        {"lora_alpha": 32, "init_r": 12, "target_r": 8},
        _schedule,
    ),
    "DELORA": PeftMethod("low-rank update of bounded norm", "DELORA"),
    "DEFT": PeftMethod("low-rank replacement of a projected part of W", "DEFT"),
    "GLORA": PeftMethod("low-rank scale and shift of W, of the input and of the bias", "GLORA"),
    "GRALORA": PeftMethod("block-wise low-rank update", "GRALORA", {}, lambda fit: {"r": fit.divisor(32)}),
    "HIRA": PeftMethod("W times a low-rank matrix, element by element", "HIRA"),
    "LILY": PeftMethod("low-rank updates that share their B between layers", "LILY"),
    "LOHA": PeftMethod("product of two low-rank matrices, element by element", "LOHA"),
    "LOKR": PeftMethod("Kronecker product of small matrices", "LOKR"),
    "MISS": PeftMethod(
        "one small matrix shared by the shards of W",
        "MISS",
        {},
        lambda fit: {"r": fit.smallest(lambda rows, columns: columns, 64)},
    ),
    "PEANUT": PeftMethod("low-rank update through a small network of W", "PEANUT"),
    "PSOFT": PeftMethod(
        "rotation inside W's leading subspace",
        "PSOFT",
        {},
        lambda fit: {"r": fit.smallest(min, 32)},
    ),
    "OSF": PeftMethod("W's small singular directions, the large ones protected", "OSF"),
    # shared or random bases
    "VERA": PeftMethod("scales of one frozen random low-rank pair", "VERA"),
    "PVERA": PeftMethod("VeRA with sampled scales", "PVERA"),
    "RANDLORA": PeftMethod("scales of several frozen random pairs, full rank", "RANDLORA"),
    "TINYLORA": PeftMethod("a few numbers per layer over W's singular vectors", "TINYLORA"),
    "UNILORA": PeftMethod("one short vector, projected onto every layer", "UNILORA"),
    "VBLORA": PeftMethod(
        "low-rank factors mixed from one bank of vectors",
        "VBLORA",
        {},
        lambda fit: {"vector_length": fit.divisor(256)},
    ),
    "FROD": PeftMethod("sparse update in a basis shared by the layers of one kind", "FROD", {"progressbar": False}),
    # rotations
    "OFT": PeftMethod(
        "block-diagonal rotation of the input", "OFT", {}, lambda fit: {"oft_block_size": fit.divisor(32)}
    ),
    "BOFT": PeftMethod(
        "rotation as a product of butterfly factors", "BOFT", {}, lambda fit: {"boft_block_size": fit.divisor(4)}
    ),
    "HRA": PeftMethod("rotation as a product of reflections", "HRA"),
    "ROAD": PeftMethod("rotation of pairs of outputs", "ROAD", {}, lambda fit: {"group_size": fit.divisor(64)}),
    # transforms and sparse updates
    "C3A": PeftMethod("block-circulant update", "C3A", {}, lambda fit: {"block_size": fit.divisor(256)}),
    "FOURIERFT": PeftMethod(
        "a few Fourier coefficients of the update",
        "FOURIERFT",
        {},
        lambda fit: {"n_frequency": fit.smallest(lambda rows, columns: rows * columns, 1000)},
    ),
    "WAVEFT": PeftMethod(
        "a few wavelet coefficients of the update",
        "WAVEFT",
        {},
        lambda fit: {"n_frequency": fit.smallest(lambda rows, columns: rows * columns, 2592)},
    ),
    "SHIRA": PeftMethod(
        "a random sparse part of W, as many entries as LoRA of rank r has",
        "SHIRA",
        {"random_seed": 0},
        lambda fit: {"r": fit.smallest(lambda rows, columns: rows * columns // (rows + columns), 32)},
    ),
    "SUPERTUNING": PeftMethod("the largest one percent of W", "SUPERTUNING"),
    # scales, biases, norms
    "IA3": PeftMethod(
        "scales of keys, values and feed-forward inputs",
        "IA3",
        targets="peft",
        per_model_type={"distilbert": {"target_modules": ["k_lin", "v_lin", "lin2"], "feedforward_modules": ["lin2"]}},
    ),
    "BEFT": PeftMethod(
        "biases of the value projections",
        "BEFT",
        targets="peft",
        per_model_type={"distilbert": {"target_modules": ["v_lin"]}},
    ),
    "LN_TUNING": PeftMethod("the norms", "LN_TUNING", targets="norms"),
    # inputs
    "PROMPT_TUNING": PeftMethod(
        "virtual tokens before the input", "PROMPT_TUNING", _PROMPT, targets="none", hides_padding=True
    ),
    "P_TUNING": PeftMethod(
        "virtual tokens made by a small network", "P_TUNING", _PROMPT, targets="none", hides_padding=True
    ),
    "PREFIX_TUNING": PeftMethod(
        "keys and values before the input, in every layer", "PREFIX_TUNING", _PROMPT, targets="none", tasks=_CAUSAL
    ),
    "CARTRIDGE": PeftMethod(
        "a trained key-value cache, its first token frozen", "CARTRIDGE", _PROMPT, targets="none", tasks=_CAUSAL
    ),
    "ADAPTION_PROMPT": PeftMethod(
        "gated prompts in the attention of the top layers",
        "ADAPTION_PROMPT",
        {"adapter_len": 10, "adapter_layers": 2},
        targets="none",
        model_types=("llama", "mistral", "gpt2"),
        tasks=_CAUSAL,
    ),
    "TRAINABLE_TOKENS": PeftMethod(
        "the embeddings of chosen tokens",
        "TRAINABLE_TOKENS",
        targets="none",
        required=("token_indices",),
        tasks=_CAUSAL,
    ),
    "SHADOW": PeftMethod(
        "a small model beside the frozen one that corrects its blocks", "SHADOW", targets="none", tasks=_CAUSAL
    ),
}

UNSUPPORTED: dict[str, str] = {
    "ADAMSS": "needs scikit-learn, which is not among the dependencies",
    "CPT": "its loss needs a token-type mask with every example, which ordinary batches do not carry",
    "MULTITASK_PROMPT_TUNING": "needs a task id with every example; studies here have one task: use PROMPT_TUNING",
    "POLY": "needs a task id with every example; studies here have one task: use LORA",
    "XLORA": "mixes LoRA adapters that were trained before; it does not train from a base model",
}
