"""Any PEFT method by its name: `{peft: VERA, r: 64}` becomes a checked config and a wrapped model.

Parameters are PEFT's own, checked by PEFT's own config class; what is not given gets a default that fits the model
(all linear layers of the backbone, and sizes that its dimensions admit). Which methods there are: `peft_registry`.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from peft import PeftConfig, PeftType, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.integrations import dequantize_module_weight
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from tunemap.errors import UserError
from tunemap.methods.eva import start_along_activations
from tunemap.methods.parameters import Shape, heads_to_save, is_quantised, linear_shapes
from tunemap.methods.peft_registry import SUPPORTED, UNSUPPORTED, Fit, PeftMethod
from tunemap.methods.undisturbed import Batch, LossFunction, model_loss, own_random_stream, undisturbed

# Starts that move a part of the base weights into the adapter.
_MOVES_WEIGHTS = ("lora_ga", "corda", "pissa", "olora")

# Set by PEFT or by the run itself, so not parameters of a method.
_NOT_PARAMETERS = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}


def build_config(
    peft_type: str,
    parameters: Mapping[str, Any],
    *,
    model: nn.Module,
    task_type: str,
    total_steps: int | None = None,
) -> PeftConfig:
    """The checked PEFT config of a method by name, with defaults for `model`, which is only looked at.

    `task_type` is PEFT's (CAUSAL_LM, SEQ_CLS); `total_steps` is the number of optimizer steps, for methods with a
    schedule. UserError names what is wrong, the nearest right name and the allowed ones.
    """
    name, entry = _entry(peft_type)
    model_config: Any = getattr(model, "config", None)
    model_type = getattr(model_config, "model_type", "")
    if entry.model_types and model_type not in entry.model_types:
        raise UserError(
            f"method {name}: PEFT implements it for {', '.join(entry.model_types)}; this model is {model_type}"
        )
    if task_type not in entry.tasks:
        raise UserError(f"method {name}: does not train on {task_type}; allowed: {', '.join(entry.tasks)}")
    if entry.hides_padding and task_type == "SEQ_CLS" and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        # transformers looks for the last token among token numbers, and without them takes the last place of the row.
        raise UserError(
            f"method {name}: hides where a text ends from a decoder ({model_type}), which would read the class at its "
            "padding; classify with an encoder such as BERT, or by another method"
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(entry.peft_type)]
    given = _checked_parameters(name, config_class, parameters)
    missing = [key for key in entry.required if not given.get(key)]
    if missing:
        raise UserError(f"method {name}: {', '.join(missing)} is needed and has no sensible default")
    shapes = linear_shapes(model)
    if given.get("target_modules") == "all-linear":
        # PEFT's own shorthand adapts part of some classification heads, which are trained in full.
        given["target_modules"] = _endings(shapes, model)
    base = {**entry.defaults, **_default_targets(entry, model, shapes), **entry.per_model_type.get(model_type, {})}
    base = {**base, **_heads(config_class, model, task_type), **_prompt_dimensions(config_class, model_config), **given}
    matched = _matched(shapes, base.get("target_modules"))
    values = {**base, **entry.fitted(Fit(base, matched, task_type, total_steps)), **given}
    try:
        return config_class(task_type=task_type, **_checked_parameters(name, config_class, values))
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"method {name}: {error}") from error


def apply_peft(
    model: nn.Module,
    config: PeftConfig,
    *,
    batches: Iterable[Batch] | None = None,
    original_weight: Callable[[str], torch.Tensor] | None = None,
    loss_function: LossFunction = model_loss,
    autocast_adapter_dtype: bool = True,
    seed: int = 0,
) -> Any:
    """Wrap `model` by PEFT, data-driven starts included; draws nothing from the caller's random stream.

    `batches` (keyword arguments of the loss function, on the model's device) are needed by EVA, LoRA-GA and CorDA, and
    must be the same on every process: these starts change weights. `original_weight` gives LoftQ the unquantised
    weight (out x in) of a module by its name. `autocast_adapter_dtype` keeps the adapters of a half-precision base in
    fp32. UserError where PEFT refuses the model.
    """
    start = getattr(config, "init_lora_weights", True)
    examples = list(batches or [])
    if start in ("eva", "lora_ga", "corda") and not examples:
        raise UserError(f"init_lora_weights {start}: the start is computed from data; give it batches")
    if start in _MOVES_WEIGHTS and any(is_quantised(p) for p in model.parameters()):
        raise UserError(f"init_lora_weights {start}: moves a part of the base weights, which are quantised")
    if start == "loftq":
        if original_weight is None or not any(is_quantised(p) for p in model.parameters()):
            raise UserError("init_lora_weights loftq: needs a 4-bit model and the original weights beside it")
        # PEFT's own start runs on CUDA only and leaves the base rounded but unquantised; and a plain config lets the
        # adapter load over the same 4-bit base.
        config = dataclasses.replace(config, init_lora_weights=True, loftq_config={})
    with own_random_stream(next(model.parameters()).device, seed):
        try:
            with undisturbed(model):
                if start == "lora_ga":
                    preprocess_loraga(model, config, lambda: _backward(model, examples, loss_function))
                elif start == "corda":
                    preprocess_corda(model, config, run_model=lambda: _forward_each_sequence(model, examples))
            peft_model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
            _freeze_counts(peft_model)
            if start == "eva":
                start_along_activations(peft_model, config, examples)
        except (ValueError, TypeError, NotImplementedError) as error:
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UserError(f"method {kind}: PEFT refuses this model or these parameters: {error}") from error
    if start == "loftq" and original_weight is not None:
        _start_at_the_rounding_error(peft_model, original_weight)
    if start in _MOVES_WEIGHTS:
        peft_model.moved_start = _cloned(get_peft_model_state_dict(peft_model))
    return peft_model


def _freeze_counts(peft_model: nn.Module) -> None:
    """Keep AdaLoRA's counts of ranks from being trained: PEFT's cast of adapters to float32 asks gradients of them."""
    for name, parameter in peft_model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


def save_adapter(peft_model: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Save an adapter so that it loads over the original base model, wherever that is.

    `state` is the adapter's state as `get_peft_model_state_dict` gives it, where the model's own is sharded.

    PEFT saves what LoRA-GA and CorDA trained without what their start took from the base weights; loading it then
    gives another model (LoRA-GA, silently) or fails (CorDA). Since s (B A - B0 A0) = s [B, -B0] [A; A0], such an
    adapter is saved as plain LoRA of twice the rank.
    """
    start = getattr(peft_model, "moved_start", None)
    if start is None:
        peft_model.save_pretrained(str(folder), state_dict=state)
        return
    state = _cloned(get_peft_model_state_dict(peft_model) if state is None else state)
    for name, value in state.items():
        if "lora_A" in name:
            state[name] = torch.cat([value, start[name]], dim=0)
        elif "lora_B" in name:
            state[name] = torch.cat([value, -start[name]], dim=1)
    config = peft_model.peft_config["default"]
    alpha_factor = math.sqrt(2) if config.use_rslora else 2  # keeps alpha / r, or alpha / sqrt(r)
    doubled = dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=alpha_factor * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={key: alpha_factor * alpha for key, alpha in (config.alpha_pattern or {}).items()},
        init_lora_weights=True,
        corda_config=None,
        lora_ga_config=None,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    doubled.save_pretrained(str(folder))


def after_optimizer_step(peft_model: Any, step: int) -> None:
    """What some methods do between `optimizer.step()` and `zero_grad()` at optimizer step `step` (from 0).

    AdaLoRA reads the gradients to reallocate its ranks; for every other method nothing happens.
    """
    allocate = getattr(getattr(peft_model, "base_model", None), "update_and_allocate", None)
    if allocate is not None:
        allocate(step)


def penalty(peft_model: Any) -> torch.Tensor | float:
    """What a method adds to the loss, per optimizer step: AdaLoRA's orthogonality of A and B, nothing elsewhere.

    Mean over the factors P of the Frobenius norm of P P^T - 1, times orth_reg_weight (Zhang et al. 2023,
    https://arxiv.org/abs/2303.10512, eq. 4). PEFT adds it to losses that the model itself computes only.
    """
    config = _adalora_config(peft_model)
    if config is None:
        return 0.0
    terms = []
    for name, parameter in peft_model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append(torch.linalg.norm(square - torch.eye(*square.shape, out=torch.empty_like(square))))
    return config.orth_reg_weight * torch.stack(terms).mean()


def method_state(peft_model: Any) -> dict[str, Any]:
    """What a method remembers between steps besides its parameters (AdaLoRA's sensitivities); empty elsewhere."""
    config = _adalora_config(peft_model)
    if config is None:
        return {}
    allocator = peft_model.base_model.rankallocator
    return {name: getattr(allocator, name) for name in _SENSITIVITIES} | {"rank_pattern": config.rank_pattern}


def load_method_state(peft_model: Any, state: Mapping[str, Any]) -> None:
    """Restore what `method_state` gave."""
    config = _adalora_config(peft_model)
    if config is None:
        return
    device = next(peft_model.parameters()).device
    for name in _SENSITIVITIES:
        values = {parameter: value.to(device) for parameter, value in state[name].items()}
        setattr(peft_model.base_model.rankallocator, name, values)
    config.rank_pattern = state["rank_pattern"]


_SENSITIVITIES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def _adalora_config(model: Any) -> Any:
    base = getattr(model, "base_model", None)
    return model.peft_config["default"] if getattr(base, "rankallocator", None) is not None else None


def loraplus_optimizer(
    peft_model: nn.Module,
    optimizer_class: Callable[..., torch.optim.Optimizer],
    *,
    lr: float,
    ratio: float,
    weight_decay: float = 0.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """LoRA+: B learns `ratio` times as fast as all else (Hayou et al. 2024, https://arxiv.org/abs/2402.12354).

    PEFT's own helper also speeds up whatever has one dimension, such as the biases of a classifier's head.
    """
    trained = {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    fast = [parameter for name, parameter in trained.items() if "lora_B" in name]
    if not fast:
        raise UserError("lora+: the model has no trainable lora_B; LoRA+ needs a method of the LoRA family")
    others = [parameter for name, parameter in trained.items() if "lora_B" not in name]
    groups = [{"params": others, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    return optimizer_class(groups, lr=lr, weight_decay=weight_decay, **options)


def _entry(peft_type: str) -> tuple[str, PeftMethod]:
    name = str(getattr(peft_type, "value", peft_type)).upper().replace("-", "_")
    if name in UNSUPPORTED:
        raise UserError(f"method {name}: not supported: {UNSUPPORTED[name]}")
    if name not in SUPPORTED:
        raise UserError(f"no PEFT method {peft_type!r}{_nearest(name, SUPPORTED)}; allowed: {', '.join(SUPPORTED)}")
    return name, SUPPORTED[name]


def _nearest(word: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _checked_parameters(name: str, config_class: type[PeftConfig], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Each parameter under PEFT's own name and of PEFT's own type (nested configs may be given as mappings)."""
    allowed = [f.name for f in dataclasses.fields(config_class) if f.init and f.name not in _NOT_PARAMETERS]
    hints = get_type_hints(config_class)
    checked = {}
    for key, value in parameters.items():
        if key not in allowed:
            raise UserError(
                f"method {name}: no parameter {key!r}{_nearest(key, allowed)}; allowed: {', '.join(sorted(allowed))}"
            )
        try:
            # None is PEFT's "not given", also for fields whose declared type forgets to say so; and the declared
            # type of init_lora_weights lacks some of the starts that PEFT knows.
            free = value is None or key == "init_lora_weights"
            checked[key] = value if free else TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]
            raise UserError(f"method {name}: {key} is {value!r}: {problem['msg']}") from error
    return checked


def _default_targets(entry: PeftMethod, model: nn.Module, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    if entry.targets == "linear":
        return {"target_modules": _endings(shapes, model)}
    if entry.targets == "norms":
        names = [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]
        return {"target_modules": _endings(names, model)}
    return {}


def _endings(names: Iterable[str], model: nn.Module) -> list[str]:
    """The names' last parts where these mean exactly these modules, else the full names."""
    wanted = set(names)
    endings = {name.rsplit(".", 1)[-1] for name in wanted}
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in endings}
    return sorted(endings if meant == wanted else wanted)


def _matched(shapes: Mapping[str, Shape], targets: Any) -> dict[str, Shape]:
    """The linear layers among the targets, matched as PEFT does: a string is a pattern, a list holds endings."""
    if targets is None:
        return {}
    if isinstance(targets, str):
        return {name: shape for name, shape in shapes.items() if re.fullmatch(targets, name)}
    return {n: s for n, s in shapes.items() if any(n == t or n.endswith(f".{t}") for t in targets)}


def _heads(config_class: type[PeftConfig], model: nn.Module, task_type: str) -> dict[str, Any]:
    """A new head must train in full, whatever its name."""
    if task_type != "SEQ_CLS" or "modules_to_save" not in {f.name for f in dataclasses.fields(config_class)}:
        return {}
    return {"modules_to_save": heads_to_save(model)}


def _prompt_dimensions(config_class: type[PeftConfig], model_config: Any) -> dict[str, Any]:
    """Sizes that PEFT reads from the model's config under names that not every architecture uses."""
    if "token_dim" not in {f.name for f in dataclasses.fields(config_class)} or model_config is None:
        return {}
    if hasattr(model_config, "num_key_value_heads"):  # grouped heads: PEFT derives the dimensions itself
        return {}
    return {
        "token_dim": model_config.hidden_size,
        "num_layers": model_config.num_hidden_layers,
        "num_attention_heads": model_config.num_attention_heads,
    }


def _cloned(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def _backward(model: nn.Module, batches: list[Batch], loss_function: LossFunction) -> None:
    for batch in batches:
        loss_function(model, batch).backward()


def _forward_each_sequence(model: nn.Module, batches: list[Batch]) -> None:
    """CorDA's hooks read one unpadded sequence at a time, without labels."""
    for batch in batches:
        tokens = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(tokens)).bool()
        for row, kept in zip(tokens, mask, strict=True):
            model(input_ids=row[kept][None])


@torch.no_grad()
def _start_at_the_rounding_error(peft_model: Any, original_weight: Callable[[str], torch.Tensor]) -> None:
    """LoftQ, one iteration: s B A is the best rank-r approximation of W - Q (Li et al. 2023, arXiv 2310.08659, alg. 1).

    Unlike PEFT's own, the factors allow for the adapter's scaling s.
    """
    for name, layer in peft_model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            rounded = dequantize_module_weight(layer.get_base_layer()).float()
            lost = original_weight(name).to(rounded.device, torch.float32) - rounded
            left, values, right = torch.linalg.svd(lost, full_matrices=False)
            rank, scaling = layer.r["default"], layer.scaling["default"]
            root = (values[:rank] / scaling).sqrt()
            layer.lora_A["default"].weight.copy_(root[:, None] * right[:rank])
            layer.lora_B["default"].weight.copy_(left[:, :rank] * root)
