"""Published peak memory beside the planner's, each planned with the setting of its publication, flaws included.

    python benchmarks/planner.py --published    # prints the table, writes benchmarks/results/planner-published.csv

What the publications did otherwise than TuneMap, and how it is planned here:

- The model was told of its padding, so that its attention used a mask and copies of the keys and values.
- The loss was torch's `cross_entropy` of logits made float32, and LoRA's sum was PEFT's.
- AdamW was torch's default, which keeps a temporary as large as the gradients (`foreach`).
- DDP kept a bucket beside each gradient (`gradient_as_bucket_view=False`).
- FSDP was one flat unit (`use_orig_params=True` and no wrap policy): one parameter of which all weights are views, so
  that its gradient is put together from the gradients of all weights, frozen ones too.

Adapters, dtypes, batches and lengths are those of the published code; peaks are torch's
(`max_memory_allocated`), so that cuBLAS' workspaces and the scratch of 4-bit kernels count, the CUDA context does not.
Beside each stands the plan of the same run as TuneMap trains it, without any of this.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from tunemap.config import DatasetConfig, Factors, RandomModel
from tunemap.files import write_atomic
from tunemap.hardware import load_hardware
from tunemap.methods import apply
from tunemap.models.loading import build_config
from tunemap.planner import device, fake, memory
from tunemap.planner.device import Target
from tunemap.planner.prediction import Account, BatchShape
from tunemap.report.published_numbers import FILE
from tunemap.run import Run
from tunemap.training import loop, optimizer

RESULTS = Path(__file__).resolve().parent / "results" / "planner-published.csv"
NEAR = 0.10
MIB = 1 << 20
COLUMNS = {"tensors": "tensors", "unpacked 4-bit weights": "unpacked_weights", "cuBLAS workspaces": "workspaces"}
A100 = Target.gpu(load_hardware("a100-40gb"))
QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 1536,
    "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "tie_word_embeddings": True, "max_position_embeddings": 32768,
}  # fmt: skip
DISTILBERT = {"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"]}
SST2_LONGEST = 66  # tokens of the longest training sentence of SST-2; batches were padded to their own longest


# --- what the publications did otherwise ------------------------------------------------------------------


class PlainBuckets(fake.Buckets):
    """DDP as it is by default: a gradient is copied into its bucket and back, and both stay."""

    def _into(self, view: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                view.copy_(parameter.grad)
                parameter.grad.copy_(view)

        return hook


class _Gather(torch.autograd.Function):
    """One flat tensor of all weights from this rank's shards, which `held` keeps; its gradient becomes a flat shard."""

    @staticmethod
    def forward(ctx: Any, held: list[torch.Tensor], elements: int, *shards: torch.Tensor) -> torch.Tensor:
        ctx.held, ctx.shards = held, [(shard.shape, shard.requires_grad) for shard in shards]
        whole = torch.empty(elements, dtype=shards[0].dtype)
        held.append(whole.detach())
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.held.clear()
        whole = torch.empty(sum(shape.numel() for shape, _ in ctx.shards), dtype=gradient.dtype)
        parts = whole.split([shape.numel() for shape, _ in ctx.shards])
        return None, None, *(part if trained else None for part, (_, trained) in zip(parts, ctx.shards, strict=True))


class FlatUnit(DistributedDataParallel):
    """FSDP's first version around the whole model, among `ranks`: gathered once a step, from forward to backward."""

    ranks = 1

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = model
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        shards: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    part = torch.empty(-(-parameter.numel() // self.ranks), dtype=parameter.dtype)
                    shard = shards.setdefault(id(parameter), nn.Parameter(part, requires_grad=parameter.requires_grad))
                    module._parameters[name] = shard
        self._gathered: list[torch.Tensor] = []

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Not used: no published run accumulated gradients."""
        yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, with views of the flat tensor in the place of its weights."""
        shards = dict(self.module.named_parameters())
        sizes = [shape.numel() for shape in self._shapes.values()]
        views = _Gather.apply(self._gathered, sum(sizes), *(shards[name] for name in self._shapes)).split(sizes)  # type: ignore[no-untyped-call]
        weights = {name: view.view(shape) for view, (name, shape) in zip(views, self._shapes.items(), strict=True)}
        return torch.func.functional_call(self.module, weights, args, kwargs)


def _plain_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignored: int) -> torch.Tensor:
    return cross_entropy(logits.float(), labels, ignore_index=ignored, reduction="sum")


def _default_adamw(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    assert name == "adamw"
    return torch.optim.AdamW, {"foreach": True}


# --- the published runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A number of resources/published/numbers.csv, and the run that it is of. wrapping: what stands for DDP or FSDP."""

    number: str
    model: dict[str, Any]
    method: dict[str, Any]
    rows: int
    width: int
    precision: str
    factors: dict[str, Any] = field(default_factory=dict)
    wrapping: type[DistributedDataParallel] | None = None


LORA = {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.05}
BF16_LORA = LORA | {"adapter_dtype": "bfloat16"}
FULL = {"kind": "full"}


def published_runs() -> Iterator[Published]:
    """Peaks of torch's allocator with a known setting, in the order of the file."""
    for number, method, factors in (
        ("N013", LORA, {}),
        ("N023", {"kind": "gora", "variant": "gora_hpml", "dropout": 0.05, "adapter_dtype": "bfloat16"}, {}),
        ("N034", LORA | {"kind": "qlora"}, {}),
        ("N037", LORA, {"gradient_checkpointing": True}),
    ):
        yield Published(number, QWEN, method, 8, 512, "bf16", factors)
    for method, one, ddp, fsdp in (
        (FULL, "N041", ("N043", "N045"), ("N044", "N046")),
        (BF16_LORA, "N064", ("N066", "N068"), ("N067", "N069")),
    ):
        yield Published(one, QWEN, method, 4, 256, "pure_bf16")
        for numbers, wrapping in ((ddp, PlainBuckets), (fsdp, FlatUnit)):
            for number, gpus in zip(numbers, (2, 4), strict=True):
                spread = {"strategy": "ddp", "gpus": gpus}  # both wrappings take the place of DDP
                yield Published(number, QWEN, method, 4, 256, "pure_bf16", spread, wrapping)
    yield Published("C007", DISTILBERT, FULL, 8, SST2_LONGEST, "fp32")
    for kind, numbers, factors in (
        ("lora", ("C022", "C023", "C024", "C025"), {}),
        ("qlora", ("C059", "C060", "C061", "C062"), {}),
    ):
        for number, rank in zip(numbers, (4, 8, 16, 32), strict=True):
            method = {"kind": kind, "rank": rank, "dropout": 0.1, "target_modules": ["q_lin", "v_lin"]}
            yield Published(number, DISTILBERT, method, 32, SST2_LONGEST, "fp32", factors)


def plan(one: Published, *, as_published: bool = True) -> Account:
    """The account of a published run on a GPU, or of the same run as TuneMap trains it."""
    classifies = one.model is DISTILBERT
    task = DatasetConfig(task="sst2" if classifies else "gsm8k", source="hub", id="owner/data")
    run = Run.model_validate(
        {
            "id": one.number,
            "model_name": "published",
            "model": RandomModel(source="random", config="published", tokenizer="published"),
            "dataset_name": "published",
            "dataset": task,
            "method_name": one.method["kind"],
            "method": one.method,
            "prompt_template": None,
            "factors": Factors(
                **{"precision": one.precision, "max_grad_norm": None, "per_device_batch_size": one.rows, "max_steps": 9}
                | one.factors
                | ({"strategy": "fsdp"} if one.wrapping is FlatUnit and not as_published else {})
            ),
        }
    )
    config = build_config(one.model, Path("published"))
    with _published_ways(one, run.factors.gpus) if as_published else nullcontext():
        batch = BatchShape(one.rows, one.width, padded=True)
        return memory.account(run, config, batch, num_labels=2 if classifies else None, on_gpu=True)


@contextmanager
def _published_ways(one: Published, gpus: int) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(optimizer, "_kind", _default_adamw))
        masked = partial(fake.fake_batch, mask_padding=True)
        stack.enter_context(mock.patch.object(fake, "fake_batch", masked))
        stack.enter_context(mock.patch.object(loop, "cross_entropy_sum", _plain_cross_entropy))
        stack.enter_context(mock.patch.object(apply, "fuse_low_rank_sums", return_value=None))
        if one.wrapping is not None:
            stack.enter_context(mock.patch.object(fake, "Buckets", one.wrapping))
            stack.enter_context(mock.patch.object(FlatUnit, "ranks", gpus))
        yield


def _parts_mib(account: Account) -> dict[str, float]:
    parts = device.device_bytes(account, A100, devices=1)
    return {name: parts[name] / MIB for name in COLUMNS}


def compare_published() -> int:
    """Plan each, print and keep; the exit code says whether all are near."""
    torch.set_num_threads(1)
    with FILE.open(newline="", encoding="utf-8") as file:
        numbers = {row["id"]: row for row in csv.DictReader(file)}
    table = Table(title="Published peak memory, planned with its setting and its flaws", title_justify="left")
    for column in ("number", "published as", "GPUs", "published, MiB", "planned, MiB", "error", "by TuneMap, MiB"):
        table.add_column(column, justify="left" if column in ("number", "published as") else "right")
    rows = []
    for one in published_runs():
        number, account = numbers[one.number], plan(one)
        allocated, ours = _parts_mib(account), sum(_parts_mib(plan(one, as_published=False)).values())
        published, planned = float(number["value"]), sum(allocated.values())
        error = planned / published - 1
        rows.append(
            {
                "number": one.number, "source": number["source"], "method": number["method"], "gpus": number["gpus"],
                "rows": one.rows, "width": one.width, "published_mib": published, "planned_mib": round(planned, 1),
                "error": round(error, 4), "by_tunemap_mib": round(ours, 1), "trust": number["trust"],
                "phase": account.peak_phase,
                **{f"{COLUMNS[name]}_mib": round(size, 1) for name, size in allocated.items()},
            }
        )  # fmt: skip
        cells = f"{published:,.1f}", f"{planned:,.1f}", f"{error:+.1%}", f"{ours:,.1f}"
        table.add_row(one.number, f"{number['seed']} {number['method']}", number["gpus"], *cells)
    Console(width=140).print(table)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(RESULTS, text.getvalue())
    return 0 if all(abs(row["error"]) <= NEAR for row in rows) else 1
