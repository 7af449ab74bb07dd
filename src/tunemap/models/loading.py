"""Loading a prepared model folder for training, evaluation or planning: the dtype, 4-bit layers and head it asks for.

Freezing, adapters and gradient checkpointing are the business of `tunemap.methods`; in particular peft's
`prepare_model_for_kbit_training` is not used anywhere, because it turns the norms to float32 and switches gradient
checkpointing on without being asked.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torch.nn.functional import pad
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tunemap.data import tokenizers
from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.models.folder import CONFIG, check_sizes, weight_files

TaskKind = Literal["generation", "classification"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]

_AUTO = {"generation": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}
_DERIVED = re.compile(r"(position_ids|inv_freq|masked_bias)$")  # buffers of old checkpoints that are recomputed
_TOKEN_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Quantization:
    """4-bit storage of the linear layers (QLoRA; Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""

    quantization_type: Literal["nf4", "fp4"]
    double_quantization: bool
    compute_dtype: torch.dtype


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; one without a pad token pads with its end-of-sequence token."""
    with quiet():
        tokenizer = tokenizers.load_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{folder}/tokenizer_config.json: names neither a pad_token nor an eos_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    folder: Path,
    *,
    task_kind: TaskKind,
    num_labels: int | None,
    dtype: torch.dtype,
    quantization: Quantization | None,
    attention: Attention,
    seed: int,
    device: torch.device | str,
) -> PreTrainedModel:
    """Load the weights of `folder` in `dtype` on `device`, ready for a method to choose what is trained.

    With `quantization`, the linear layers of the transformer blocks are kept in 4 bits; embeddings, norms, biases
    and the output layer or classification head stay in `dtype`. A new classification head (`num_labels` outputs)
    is drawn from `seed` alone, so that it is the same for every method, dtype and device; a head that the folder
    holds is kept.

    Raises:
        UserError: the folder is incomplete, was changed after it was prepared, cannot do this task, or its weights
            do not fit its config; or the attention implementation is not available.
    """
    check_sizes(folder)
    weight_files(folder)
    config = _task_config(folder, task_kind, num_labels)
    settings: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": attention}
    settings |= {"trust_remote_code": False, "use_safetensors": True}  # no code of the folder, no pickle
    if quantization:
        outside = _linears_outside_blocks(empty_model(config, task_kind=task_kind, num_labels=num_labels))
        settings |= {"quantization_config": _bitsandbytes(quantization, outside), "device_map": {"": str(device)}}
    with quiet(), explained(folder):
        if quantization:
            _repaired_cpu_kernel()
        model, report = _AUTO[task_kind].from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    drawn = _drawn_keys(folder, model, report)
    _draw_head(model, drawn, seed)
    if quantization:
        _keep_training_layout(model)
        assert_quantised(model)
    else:
        model.to(device)
    _set_pad_token(model, folder)
    return _settled(model, attention)


def empty_model(
    source: Path | PreTrainedConfig,
    *,
    task_kind: TaskKind,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "sdpa",
) -> PreTrainedModel:
    """The module tree of a folder, config.json or config on the meta device: shapes and dtypes without memory."""
    config = _task_config(source, task_kind, num_labels)
    with quiet(), explained(source), torch.device("meta"):
        model = _AUTO[task_kind].from_config(config, dtype=dtype, attn_implementation=attention)
    return _settled(model.eval(), attention)


def read_config(source: Path) -> PreTrainedConfig:
    """The architecture in a folder's config.json, or in a JSON file itself."""
    file = config_file(source)
    return build_config(read_json(file), file)


def config_file(source: Path) -> Path:
    """config.json of a folder; a file stands for itself."""
    return source / CONFIG if source.is_dir() else source


def build_config(settings: dict[str, Any], file: Path) -> PreTrainedConfig:
    """The transformers config of the settings of a config.json; `file` is named where they make no sense."""
    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{file}: model_type {kind} is not an architecture of transformers {transformers.__version__}")
    with quiet():
        try:
            return CONFIG_MAPPING[kind].from_dict(settings)
        except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
            raise UserError(f"{file}: no valid {kind} architecture: {brief(error)}") from error


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The stack of transformer blocks, wrapped by adapters or not: the units of sharding and of checkpointing.

    It is the list of layers that holds most parameters, rather than what `_no_split_modules` names: that is empty
    for DistilBERT and holds the embeddings too for BERT.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no list of layers")
    return max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))


def assert_quantised(model: nn.Module) -> int:
    """Number of 4-bit linear layers; raises unless every linear layer of the blocks is one, with packed weights.

    Adapters do not count: they are linear layers that are trained.
    """
    from bitsandbytes.nn import Linear4bit

    linears = [
        (name, module)
        for name, module in transformer_blocks(model).named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    ]
    packed = [module for _, module in linears if isinstance(module, Linear4bit) and module.weight.quant_state]
    if not linears or len(packed) != len(linears):
        raise RuntimeError(f"{len(packed)} of {len(linears)} linear layers of the transformer blocks are in 4 bits")
    return len(packed)


# --- config -----------------------------------------------------------------------------------------------


def _task_config(source: Path | PreTrainedConfig, task_kind: TaskKind, num_labels: int | None) -> PreTrainedConfig:
    config = copy.deepcopy(source) if isinstance(source, PreTrainedConfig) else read_config(source)
    config.use_cache = False  # with a cache object, transformers lets packed documents attend to each other
    if task_kind == "classification":
        if num_labels is None:
            raise ValueError("classification needs num_labels")
        config.num_labels = num_labels
        config.problem_type = "single_label_classification"
    elif any(name.endswith("ForMaskedLM") for name in config.architectures or ()):
        raise UserError(
            f"{source}: a {config.model_type} reads text in both directions and cannot generate any; "
            "use it with a classification task"
        )
    return config


def _settled(model: PreTrainedModel, attention: Attention) -> PreTrainedModel:
    used = model.config._attn_implementation
    if used != attention:
        raise RuntimeError(f"attention is {used}, but {attention} was asked for")
    if model.can_generate():
        # Greedy decoding as published: settings such as Qwen's repetition_penalty would act on it as well.
        kept = {name: getattr(model.generation_config, name) for name in _TOKEN_SETTINGS}
        model.generation_config = GenerationConfig(**kept, do_sample=False, use_cache=True)
    return model


def _set_pad_token(model: PreTrainedModel, folder: Path) -> None:
    """Name the padding that batches will hold: a decoder classifies at the last token that is not padding.

    Set after building the model: an embedding that is told its padding row never trains it, and where there is no
    other pad token that row is the end-of-sequence token. A fine-tuned model saved without its tokenizer keeps
    the value that it was trained with.
    """
    if tokenizers.tokenizer_files(folder):
        model.config.pad_token_id = load_tokenizer(folder).pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = model.config.pad_token_id


# --- weights ----------------------------------------------------------------------------------------------


def _drawn_keys(folder: Path, model: PreTrainedModel, report: dict[str, Any]) -> list[str]:
    """Parameters that the folder does not hold; only those of a new head may be among them."""
    mismatched = {
        name: f"{name} {tuple(found)} instead of {tuple(due)}" for name, found, due in report["mismatched_keys"]
    }
    wrong = {
        "lack": [name for name in report["missing_keys"] if _in_backbone(model, name)],
        "hold besides": [name for name in report["unexpected_keys"] if _in_backbone(model, name)],
        "have other shapes": [text for name, text in mismatched.items() if _in_backbone(model, name)],
    }
    if any(wrong.values()):
        problems = "; ".join(f"{what}: {_listed(sorted(names))}" for what, names in wrong.items() if names)
        raise UserError(f"{folder}: the weights do not fit {CONFIG}; they {problems}")
    return sorted({*report["missing_keys"], *mismatched})


def _in_backbone(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter belongs to what every task shares; BERT's pooler is part of its classification head."""
    own = name.startswith(f"{model.base_model_prefix}.") and not _DERIVED.search(name)
    return own and not name.startswith(f"{model.base_model_prefix}.pooler.")


def _draw_head(model: PreTrainedModel, names: list[str], seed: int) -> None:
    """Normal weights, zero biases and norms of one, as transformers draws them, but from `seed` and on the CPU.

    A norm of zero would pass nothing on, and no gradient to what lies before it.
    """
    generator = torch.Generator().manual_seed(seed)
    deviation = getattr(model.config, "initializer_range", 0.02)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            parameter = parameters[name]
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)


# --- 4 bits -----------------------------------------------------------------------------------------------


@functools.cache
def _repaired_cpu_kernel() -> torch.library.Library:
    """Make bitsandbytes unpack 4-bit weights rightly on CPUs with AVX512 when rows are no whole number of blocks.

    Weights are packed in blocks of 64 over the flattened matrix, but the vectorised kernel of 0.50.2 looks scales up
    row by row: a matrix of 32, 96 or 160 columns comes back with the scales of other blocks and twice the error,
    without a word. The same kernel is right for a matrix whose rows are the blocks, so that is what it is given.
    The registration lasts as long as the returned object.
    """
    import bitsandbytes  # noqa: F401 (registers the kernel)

    original = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")

    def dequantize(
        keys: torch.DispatchKeySet,
        packed: torch.Tensor,
        scales: torch.Tensor,
        block: int,
        quantization_type: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if shape[-1] % block == 0:
            return original.call_boxed(keys, packed, scales, block, quantization_type, shape, dtype)
        elements, blocks = math.prod(shape), scales.numel()
        data = packed.reshape(-1).view(torch.uint8)
        data = pad(data, (0, blocks * block // 2 - data.numel()))
        rows = original.call_boxed(keys, data, scales, block, quantization_type, [blocks, block], dtype)
        return rows.reshape(-1)[:elements].reshape(shape)

    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("dequantize_4bit", dequantize, "CPU", with_keyset=True, allow_override=True)
    return library


def _bitsandbytes(quantization: Quantization, outside: list[str]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quantization_type,
        bnb_4bit_use_double_quant=quantization.double_quantization,
        bnb_4bit_compute_dtype=quantization.compute_dtype,
        llm_int8_skip_modules=[re.escape(name) for name in outside],  # serves 4 bits too; left out, heads are packed
    )


def _linears_outside_blocks(model: PreTrainedModel) -> list[str]:
    inside = {id(module) for module in transformer_blocks(model).modules()}
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in inside]


def _keep_training_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights for inference on CPUs that have AVX512-BF16.

    In 0.50.2 the first forward pass in eval mode repacks each weight in place and training never unpacks it: layers
    with a bias then raise in the backward pass, layers without one silently lose the gradient of their input.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


# --- messages ---------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings that concern nobody; what matters is checked and raised here instead."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    bitsandbytes_log = logging.getLogger("bitsandbytes")  # warns that an optional package is not installed
    level = bitsandbytes_log.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    bitsandbytes_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bitsandbytes_log.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def explained(source: Path | PreTrainedConfig) -> Iterator[None]:
    """Turn what transformers raises about a folder or the installation into a `UserError`."""
    try:
        yield
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{source}: transformers {transformers.__version__} cannot load it: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """The first sentence or so of a message that may run over pages."""
    return " ".join(str(error).split())[:300]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
