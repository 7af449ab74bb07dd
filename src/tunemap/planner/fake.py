"""A run's model, optimizer and batches as tensors without contents, made by the code that makes them for training.

Everything runs under torch's FakeTensorMode on a fake CPU: a fake CUDA device aborts the process in builds without
CUDA. What differs from training, and why:

- The model is built on the meta device and only then becomes fake: peft cannot wrap fake modules.
- transformers builds a full attention mask when it sees fake tensors; `as_in_training` tells it what it would find in
  the contents of real ones.
- 4-bit layers are bitsandbytes' own, with packed weights that were never quantised.
- DDP's reducer reads contents in C++: `Buckets` stands for it, the rest of the step is the same.
- On a GPU dropout is CUDA's operator, which keeps smaller masks.
- FSDP is FSDP itself, among ranks that a `fake` process group pretends to have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, masking_utils

from tunemap.config import AdapterMethod, PeftMethod
from tunemap.cross_entropy import IGNORED
from tunemap.data.collate import Batch
from tunemap.distributed import strategies
from tunemap.distributed.world import World
from tunemap.models.loading import Quantization, empty_model, transformer_blocks
from tunemap.planner.prediction import BatchShape
from tunemap.run import Run, TaskKind
from tunemap.training import packed_attention
from tunemap.training.precision import PRECISIONS

BLOCK = 64  # weights per scale of a 4-bit layer, and scales per scale of scales: bitsandbytes' own
NESTED_BLOCK = 256
STARTS_OF_THEIR_OWN = ("EVA", "LORA_GA", "CORDA", "LOFTQ", "PISSA", "OLORA")  # LoRA but for the first values


class _WithoutContents(FakeTensorMode):
    """Answers what number a tensor holds: 1, and "no" to a question; both leave a step on its usual way.

    Optimizers ask for the norm of a weight, say. That no gradient is infinite is for `memory` to see to.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return super().__torch_dispatch__(func, types, args, kwargs or {})


@contextmanager
def fake_mode() -> Iterator[None]:
    """The mode in which steps are run; real tensors may enter, such as tables that a library keeps."""
    with _WithoutContents(allow_non_fake_inputs=True):
        yield


# --- the model --------------------------------------------------------------------------------------------


def base_model(
    run: Run, config: PreTrainedConfig, *, num_labels: int | None, quantization: Quantization | None
) -> nn.Module:
    """The model as it is loaded for a run, on the meta device."""
    precision = PRECISIONS[run.factors.precision]
    kind: TaskKind = run.task_kind
    model = empty_model(
        config,
        task_kind=kind,
        num_labels=num_labels,
        dtype=precision.frozen if isinstance(run.method, AdapterMethod) else precision.trained,
        # flash-attn need not be installed here; both are fused, and neither sees a mask where it is used.
        attention="sdpa" if run.factors.attention == "flash_attention_2" else run.factors.attention,
    )
    if quantization is not None:
        _quantise(model, quantization)
    return model


def with_plain_start(run: Run) -> Run:
    """The run with a start that looks at no weights and no data: what it trains has the same shapes."""
    method = run.method
    if not isinstance(method, PeftMethod) or method.type not in STARTS_OF_THEIR_OWN:
        return run
    parameters = method.parameters | {"init_lora_weights": True}
    return run.model_copy(update={"method": method.model_copy(update={"parameters": parameters})})


def _quantise(model: nn.Module, quantization: Quantization) -> None:
    """Put bitsandbytes' layers in place of the linear layers of the blocks, as transformers does while loading."""
    from bitsandbytes.nn import Linear4bit

    for parent in list(transformer_blocks(model).modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                packed = Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=layer.bias is not None,
                    compute_dtype=quantization.compute_dtype,
                    compress_statistics=quantization.double_quantization,
                    quant_type=quantization.quantization_type,
                    device="meta",
                )
                packed.weight.data = packed.weight.data.to(layer.weight.dtype)
                if layer.bias is not None:
                    packed.bias = layer.bias
                packed.support_avx512bf16_for_cpu = False
                packed.requires_grad_(False)
                setattr(parent, name, packed)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft chooses its layers by it


def materialise(model: nn.Module) -> None:
    """Give every tensor of a module tree on meta a fake storage; tied weights share theirs. Needs the fake mode."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                if hasattr(parameter, "quant_type") and not parameter.requires_grad:
                    made[id(parameter)] = _packed(parameter)
                else:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
            if hasattr(made[id(parameter)], "quant_state"):
                module.quant_state = made[id(parameter)].quant_state
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))
                module._buffers[name] = made[id(buffer)]
        for name, value in list(vars(module).items()):  # tensors that a method keeps as plain attributes
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                made.setdefault(id(value), torch.empty(value.shape, dtype=value.dtype))
                setattr(module, name, made[id(value)])


class _Never:
    """A share of steps in which a layer is left out, of which every random number is found to be larger."""

    def __lt__(self, number: torch.Tensor) -> bool:
        return True


def keep_adapters(model: nn.Module) -> None:
    """Let LoHa and LoKr layers, which draw whether they take part in a step, take part: the draw has no contents."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        shares = getattr(module, "module_dropout", None)
        if isinstance(shares, dict):
            module.module_dropout = dict.fromkeys(shares, _Never())


@contextmanager
def packed_weights_gathered() -> Iterator[None]:
    """Let 4-bit layers find their scales after FSDP has gathered their weights, which bitsandbytes does by a cast."""
    from bitsandbytes.nn import modules

    def scales_of(module: Any) -> None:
        if getattr(module.weight, "quant_state", None) is None:
            module.weight.quant_state = module.quant_state

    with mock.patch.object(modules, "fix_4bit_weight_quant_state_from_module", scales_of):
        yield


def _packed(weight: Any) -> nn.Parameter:
    """A 4-bit weight as bitsandbytes keeps it: packed bytes, a scale per block, or a byte for it if nested."""
    from bitsandbytes.functional import QuantState

    elements, blocks = weight.numel(), math.ceil(weight.numel() / BLOCK)
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if weight.compress_statistics else torch.float32),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type=weight.quant_type,
        dtype=weight.dtype,
    )
    if weight.compress_statistics:
        nested = torch.empty(math.ceil(blocks / NESTED_BLOCK))
        state.state2 = QuantState(absmax=nested, code=torch.empty(256), blocksize=NESTED_BLOCK, dtype=torch.float32)
        state.offset, state.nested = torch.empty(()), True
    packed = nn.Parameter(torch.empty((math.ceil(elements / 2), 1), dtype=torch.uint8), requires_grad=False)
    packed.quant_state, packed.bnb_quantized = state, True  # type: ignore[attr-defined]
    packed.quant_type, packed.compress_statistics = weight.quant_type, weight.compress_statistics  # type: ignore[attr-defined]
    return packed


# --- the batch --------------------------------------------------------------------------------------------


def fake_batch(shape: BatchShape, task_kind: TaskKind, *, mask_padding: bool = False) -> Batch:
    """The tensors that `data.collate` makes of a batch of this shape. Call under the fake mode."""
    size = (shape.rows, shape.width)
    inputs = {"input_ids": torch.zeros(size, dtype=torch.int64)}
    if shape.padded and not shape.packed and (mask_padding or task_kind == "classification"):
        inputs["attention_mask"] = torch.ones(size, dtype=torch.int64)
    if shape.packed:
        inputs["position_ids"] = torch.zeros(size, dtype=torch.int64)
    if task_kind == "generation":
        labels = torch.full(size, IGNORED, dtype=torch.int64)
    else:
        labels = torch.zeros(shape.rows, dtype=torch.int64)
    tokens = shape.rows * shape.width
    label_tokens = tokens if shape.label_tokens is None else shape.label_tokens
    positions = torch.zeros(label_tokens, dtype=torch.int64)
    return Batch(inputs, labels, positions, tokens, label_tokens, padded_tokens=tokens, samples=shape.rows)


@contextmanager
def as_in_training(shape: BatchShape) -> Iterator[None]:
    """Answer transformers' questions about the contents of masks and positions as a batch of this shape would.

    Batches here carry an attention mask only where something is padded, so a mask is never all ones.
    """

    def documents(position_ids: torch.Tensor) -> torch.Tensor | None:
        first = position_ids[:, :1] - 1
        starts = (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)
        return starts if shape.packed else None

    def unmasked(padding: torch.Tensor | None, length: int, local: int | None = None) -> bool:
        return padding is None and (local is None or length < local)

    answers: dict[str, Any] = {
        "is_tracing": lambda tensor=None: False,
        "fast_all": lambda tensor: False,
        "find_packed_sequence_indices": documents,
        "_ignore_bidirectional_mask_sdpa": unmasked,
    }
    whole_rows = [shape.width] * shape.rows  # the longest documents that there may be
    with (
        mock.patch.multiple(masking_utils, **answers),
        mock.patch.object(packed_attention, "document_lengths", return_value=whole_rows),
    ):
        yield


@contextmanager
def kernels_of(on_gpu: bool) -> Iterator[None]:
    """Drop out by the operator of the device: CUDA's keeps a mask of bytes, the CPU's one in the dtype of its input."""
    if not on_gpu:
        yield
        return

    def dropout(values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(values, p, training)[0] if training and p > 0 else values

    with mock.patch.object(torch.nn.functional, "dropout", dropout):
        yield


# --- the strategies ---------------------------------------------------------------------------------------


class Buckets(DistributedDataParallel):
    """What DDP does to memory with `gradient_as_bucket_view`: buckets as large as the gradients, from start to end.

    A gradient is made by autograd, copied into its bucket, and then is a view of it; without synchronisation it stays
    where autograd put it.
    """

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = model
        self._synchronise = True
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
            alike = [parameter for parameter in trained if parameter.dtype == dtype]
            bucket = torch.empty(sum(parameter.numel() for parameter in alike), dtype=dtype)
            views = bucket.split([parameter.numel() for parameter in alike])
            for parameter, view in zip(alike, views, strict=True):
                parameter.register_post_accumulate_grad_hook(self._into(view.view(parameter.shape)))

    def _into(self, view: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if self._synchronise and parameter.grad is not None:
                view.copy_(parameter.grad)
                parameter.grad = view

        return hook

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients where autograd puts them."""
        self._synchronise = False
        try:
            yield
        finally:
            self._synchronise = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.module(*args, **kwargs)


@contextmanager
def fake_ranks(size: int, *, needed: bool) -> Iterator[None]:
    """A process group of `size` ranks of which only this one exists; collectives return without doing anything.

    Meshes of it hold their ranks in tensors, which must be real.
    """
    if not needed:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("the planner needs a process of its own: this one is in a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    make_mesh = strategies._mesh

    def real_mesh(strategy: str, world: World) -> DeviceMesh:
        with unset_fake_temporarily():
            return make_mesh(strategy, world)

    try:
        with mock.patch.object(strategies, "_mesh", real_mesh):
            yield
    finally:
        dist.destroy_process_group()
