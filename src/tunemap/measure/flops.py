"""FLOPs of a training step in closed form: its matrix products by direction, for any choice of trained weights.

Conventions. One multiply-add is two FLOPs. Only matrix products count (norms, activations, softmax, optimizer and
4-bit dequantisation do not), so that a 4-bit base costs what a 16-bit one costs. Every padded position counts: the
device computes it. Attention counts the full square of the padded width, causal or not.

*Model FLOPs* (Chowdhery et al. 2022, PaLM, appendix B, https://arxiv.org/abs/2204.02311) leave recomputation out
and give MFU; *hardware FLOPs* include it and give HFU. A frozen weight needs no dW; an input without gradient
needs no dX. Tied or not, the output layer costs the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(frozen=True)
class LinearShape:
    """One linear layer y = x Wᵀ: its name inside the model, its two sizes and what it multiplies.

    rows: how many rows it multiplies: "token" (every padded position), "sequence" (one per sequence) or "logit" (every
        padded position unless told otherwise).
    """

    name: str
    in_features: int
    out_features: int
    rows: Literal["token", "sequence", "logit"] = "token"


@dataclass(frozen=True)
class BlockShape:
    """One transformer block: q, k, v; attention; the output layer; the feed-forward layers."""

    qkv: tuple[LinearShape, LinearShape, LinearShape]
    output: LinearShape
    up: tuple[LinearShape, ...]
    down: LinearShape


@dataclass(frozen=True)
class ModelShape:
    """What the FLOPs of a transformer depend on.

    attention_width: heads × head size of the queries.
    norm_after: the block ends with a norm (post-LN, as in BERT), not with the sum.
    head: layers after the last block.
    """

    blocks: tuple[BlockShape, ...]
    attention_width: int
    norm_after: bool
    head: tuple[LinearShape, ...]

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every linear layer in the order of computation."""
        inside = (layer for block in self.blocks for layer in (*block.qkv, block.output, *block.up, block.down))
        return (*inside, *self.head)

    @property
    def linear_parameters(self) -> int:
        """Weights in the matrix products, biases left out (the N of 6 N T)."""
        return sum(layer.in_features * layer.out_features for layer in self.linears)


def model_shape(config: Any) -> ModelShape:
    """The shape of a transformers config: Qwen2 and Llama (causal LM), DistilBERT (sequence classification).

    Raises ValueError for another model type.
    """
    if config.model_type in ("qwen2", "llama"):
        return _decoder_shape(config)
    if config.model_type == "distilbert":
        return _distilbert_classifier_shape(config)
    raise ValueError(f"model type {config.model_type!r}: closed-form FLOPs are known for qwen2, llama, distilbert")


def _decoder_shape(config: Any) -> ModelShape:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query_width = config.num_attention_heads * head_size
    key_width = config.num_key_value_heads * head_size

    def block(index: int) -> BlockShape:
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        return BlockShape(
            qkv=(
                LinearShape(f"{attention}.q_proj", hidden, query_width),
                LinearShape(f"{attention}.k_proj", hidden, key_width),
                LinearShape(f"{attention}.v_proj", hidden, key_width),
            ),
            output=LinearShape(f"{attention}.o_proj", query_width, hidden),
            up=(
                LinearShape(f"{mlp}.gate_proj", hidden, intermediate),
                LinearShape(f"{mlp}.up_proj", hidden, intermediate),
            ),
            down=LinearShape(f"{mlp}.down_proj", intermediate, hidden),
        )

    return ModelShape(
        blocks=tuple(block(index) for index in range(config.num_hidden_layers)),
        attention_width=query_width,
        norm_after=False,
        head=(LinearShape("lm_head", hidden, config.vocab_size, "logit"),),
    )


def _distilbert_classifier_shape(config: Any) -> ModelShape:
    width = config.dim

    def block(index: int) -> BlockShape:
        attention, mlp = f"distilbert.transformer.layer.{index}.attention", f"distilbert.transformer.layer.{index}.ffn"
        return BlockShape(
            qkv=(
                LinearShape(f"{attention}.q_lin", width, width),
                LinearShape(f"{attention}.k_lin", width, width),
                LinearShape(f"{attention}.v_lin", width, width),
            ),
            output=LinearShape(f"{attention}.out_lin", width, width),
            up=(LinearShape(f"{mlp}.lin1", width, config.hidden_dim),),
            down=LinearShape(f"{mlp}.lin2", config.hidden_dim, width),
        )

    return ModelShape(
        blocks=tuple(block(index) for index in range(config.n_layers)),
        attention_width=width,
        norm_after=True,
        head=(
            LinearShape("pre_classifier", width, width, "sequence"),
            LinearShape("classifier", width, config.num_labels, "sequence"),
        ),
    )


@dataclass(frozen=True)
class Trained:
    """Which weights of a model get gradients.

    everything: all of them, embeddings and norms included (full fine-tuning).
    ranks: module name (as in ModelShape.linears) → rank of the LoRA update beside the frozen weight; 0 is none.
    modules: names of modules whose own weight is trained beside adapters (a classification head).
    """

    everything: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()

    def weight(self, name: str) -> bool:
        """Whether the weight of module `name` gets a gradient."""
        return self.everything or name in self.modules

    def rank(self, name: str) -> int:
        """The rank of the update beside module `name`, 0 if there is none."""
        return self.ranks.get(name, 0)


def trained_of(model: Any, shape: ModelShape) -> Trained:
    """What a torch model trains, read from its parameters: names as PEFT, DDP or FSDP2 have lengthened them.

    An adapter is a parameter `lora_A`, whose first axis is the rank. Embeddings trained beside frozen weights are not
    told from frozen ones: pass `input_requires_grad` to `step_flops` then.
    """
    parameters = [(f".{name}", parameter) for name, parameter in model.named_parameters()]
    if all(parameter.requires_grad for _, parameter in parameters):
        return Trained(everything=True)
    ranks, modules = {}, set()
    for name, parameter in parameters:
        layer = next((layer.name for layer in shape.linears if f".{layer.name}." in name), None)
        if layer is None or not parameter.requires_grad:
            continue
        if ".lora_A." in name:
            ranks[layer] = parameter.shape[0]
        elif ".lora_" not in name and name.endswith(".weight"):
            modules.add(layer)
    return Trained(ranks=ranks, modules=frozenset(modules))


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step (or micro-batch), each in its own column; they add up with `+`.

    forward, backward_dx, backward_dw: linear layers: the products, the gradients of inputs, of weights.
    attention_forward, attention_backward: the score and value products, 4 and 8 × positions² × width.
    recomputed: what gradient checkpointing computes a second time, attention included.
    attention_recomputed: the scores that a fused attention kernel computes again in its backward.
    """

    forward: int = 0
    backward_dx: int = 0
    backward_dw: int = 0
    attention_forward: int = 0
    attention_backward: int = 0
    recomputed: int = 0
    attention_recomputed: int = 0

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(StepFlops)})

    def times(self, factor: int) -> StepFlops:
        """Every column so many times."""
        return StepFlops(**{f.name: getattr(self, f.name) * factor for f in fields(StepFlops)})

    @property
    def model_flops(self) -> int:
        """What the mathematics needs: everything but recomputation."""
        return self.forward + self.backward_dx + self.backward_dw + self.attention_forward + self.attention_backward

    @property
    def hardware_flops(self) -> int:
        """What the device computes, recomputation included."""
        return self.model_flops + self.recomputed + self.attention_recomputed


def step_flops(
    shape: ModelShape,
    trained: Trained,
    batches: Sequence[tuple[int, int]],
    *,
    logit_rows: int | None = None,
    gradient_checkpointing: bool = False,
    fused_attention: bool = True,
    input_requires_grad: bool | None = None,
) -> StepFlops:
    """FLOPs of one optimizer step over `batches`: (sequences, padded width in tokens) of each micro-batch.

    logit_rows: positions of each micro-batch whose logits are computed; all of them unless told.
    gradient_checkpointing: per block and non-reentrant, which stops a recomputation at the last tensor needed.
    fused_attention: SDPA or flash kernels, whose backward computes the scores again; False for eager attention,
        and on a CPU also for SDPA with attention dropout, which torch does not fuse there.
    input_requires_grad: whether the embeddings' output carries a gradient. By default it does in full
        fine-tuning, and with gradient checkpointing (transformers' `enable_input_require_grads`).
    """
    if input_requires_grad is None:
        input_requires_grad = trained.everything or gradient_checkpointing
    total = StepFlops()
    for sequences, width in batches:
        batch = _Batch(sequences, width, fused_attention, sequences * width if logit_rows is None else logit_rows)
        stream_grad = input_requires_grad
        for block in shape.blocks:
            cost, stream_grad = _block(shape, block, trained, batch, stream_grad)
            total += cost
            if gradient_checkpointing and stream_grad:
                last = 0 if shape.norm_after else _last_product(block.down, trained, batch)
                total += StepFlops(recomputed=cost.forward + cost.attention_forward - last)
        input_grad = stream_grad
        for layer in shape.head:
            cost, input_grad = _linear(layer, trained, batch, input_grad)
            total += cost
    return total


@dataclass(frozen=True)
class _Batch:
    sequences: int
    width: int
    fused_attention: bool
    logit_rows: int

    def rows(self, layer: LinearShape) -> int:
        counts = {"sequence": self.sequences, "logit": self.logit_rows, "token": self.sequences * self.width}
        return counts[layer.rows]


def _block(
    shape: ModelShape, block: BlockShape, trained: Trained, batch: _Batch, stream_grad: bool
) -> tuple[StepFlops, bool]:
    """FLOPs of one block, recomputation left out, and whether the stream behind it carries a gradient."""
    total, grads = StepFlops(), []
    for layer in block.qkv:
        cost, grad = _linear(layer, trained, batch, stream_grad)
        total += cost
        grads.append(grad)
    total += _attention(shape.attention_width, batch, *grads)
    cost, output_grad = _linear(block.output, trained, batch, any(grads))
    total += cost
    stream_grad = stream_grad or output_grad
    inner_grad = False
    for layer in block.up:
        cost, grad = _linear(layer, trained, batch, stream_grad)
        total += cost
        inner_grad = inner_grad or grad
    cost, down_grad = _linear(block.down, trained, batch, inner_grad)
    return total + cost, stream_grad or down_grad


def _linear(layer: LinearShape, trained: Trained, batch: _Batch, input_grad: bool) -> tuple[StepFlops, bool]:
    """FLOPs of one linear layer with its adapter, and whether its output carries a gradient.

    With the update y += x Aᵀ Bᵀ of rank r: A costs 2 T r in and B 2 T r out, each way.
    """
    rows, rank, weight = batch.rows(layer), trained.rank(layer.name), trained.weight(layer.name)
    base = 2 * rows * layer.in_features * layer.out_features
    adapter_in, adapter_out = 2 * rows * rank * layer.in_features, 2 * rows * rank * layer.out_features
    cost = StepFlops(
        forward=base + adapter_in + adapter_out,
        backward_dx=adapter_out + (base + adapter_in if input_grad else 0),
        backward_dw=adapter_in + adapter_out + (base if weight else 0),
    )
    return cost, input_grad or weight or rank > 0


def _attention(width: int, batch: _Batch, query_grad: bool, key_grad: bool, value_grad: bool) -> StepFlops:
    """FLOPs of softmax(Q Kᵀ) V. A fused backward computes all its four products and the scores once more."""
    product = 2 * batch.sequences * batch.width**2 * width
    if batch.fused_attention:
        needed = any((query_grad, key_grad, value_grad))
        return StepFlops(
            attention_forward=2 * product,
            attention_backward=4 * product if needed else 0,
            attention_recomputed=product if needed else 0,
        )
    products = value_grad + (query_grad or key_grad) + query_grad + key_grad
    return StepFlops(attention_forward=2 * product, attention_backward=products * product)


def _last_product(layer: LinearShape, trained: Trained, batch: _Batch) -> int:
    """FLOPs of the block's last product, whose result backward does not need: non-reentrant checkpointing skips it."""
    rank = trained.rank(layer.name)
    return 2 * batch.rows(layer) * layer.out_features * (rank or layer.in_features)


def mfu(model_flops: float, seconds: float, peak_flops_per_s: float) -> float:
    """Model FLOPs utilisation: model FLOPs per second over the peak of all devices used. In (0, 1]."""
    return model_flops / seconds / peak_flops_per_s


def hfu(hardware_flops: float, seconds: float, peak_flops_per_s: float) -> float:
    """Hardware FLOPs utilisation: as `mfu`, recomputation counted as work."""
    return hardware_flops / seconds / peak_flops_per_s


def utilisation(
    measurements: Mapping[str, Any], *, peak_flops_per_second: float | None, devices: int, against: str = "measured"
) -> dict[str, float | None]:
    """Columns of a run from its measured FLOPs and times, against one peak per device: `measured` or `datasheet`.

    model_flops_per_second: model FLOPs of a step over its period (data wait included), all devices together.
    mfu_{against}, hfu_{against}: model and hardware FLOPs over the peak of all devices. None where one is unknown.
    """
    model, hardware, period = (
        measurements.get(name) for name in ("model_flops_per_step", "hardware_flops_per_step", "step_period_mean_s")
    )
    known = model is not None and hardware is not None and period
    peak = peak_flops_per_second * devices if peak_flops_per_second is not None else None
    return {
        "model_flops_per_second": model / period if known else None,  # type: ignore[operator]
        f"mfu_{against}": mfu(model, period, peak) if known and peak else None,  # type: ignore[arg-type]
        f"hfu_{against}": hfu(hardware, period, peak) if known and peak else None,  # type: ignore[arg-type]
    }


def flop_counter() -> Any:
    """torch's FlopCounterMode with what it misses: SDPA on a CPU and the 4-bit product of bitsandbytes.

    Counting conventions as in this file; `get_total_flops()` then is `StepFlops.hardware_flops` of what ran.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        batch, heads, positions, size = query
        return 4 * batch * heads * positions * key[-2] * size

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        batch, heads, positions, size = query
        return 10 * batch * heads * positions * key[-2] * size

    def four_bit_product(a: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * math.prod(out_shape) * a[-1]

    mapping: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        mapping[torch.ops.bitsandbytes.gemm_4bit] = four_bit_product
    return FlopCounterMode(display=False, custom_mapping=mapping)
