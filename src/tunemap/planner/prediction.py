"""What the planner says of a run: the account of one training step, and what it comes to on a device.

Imports no torch: the workflow asks while it is parsed, and a cluster job parses it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Verdict = Literal["fits", "tight", "cannot", "unknown"]
ON_GPUS = "on_gpus"  # of a run in predictions.json: what it comes to on each described GPU


@dataclass(frozen=True)
class BatchShape:
    """One micro-batch of one device: `rows` sequences of `width` tokens.

    padded: whether some row is shorter, so that the attention of a classifier needs a mask.
    packed: several examples per row.
    label_tokens: mean positions with a label; None where only the data tell, and all positions count.
    """

    rows: int
    width: int
    padded: bool
    packed: bool = False
    label_tokens: int | None = None


@dataclass(frozen=True)
class Work:
    """What a part of one rank's step computes, reads and writes, counted operator by operator.

    matmul_flops:    by dtype, FLOPs of matrix products, recomputation included; `attention_flops` likewise.
    *_bytes:         bytes that the operators of a class read and write, each operand once (nothing stays in caches).
    kernels:         operators that start at least one kernel.
    """

    matmul_flops: dict[str, int] = field(default_factory=dict)
    attention_flops: dict[str, int] = field(default_factory=dict)
    matmul_bytes: int = 0
    attention_bytes: int = 0
    other_bytes: int = 0
    kernels: int = 0

    @property
    def flops(self) -> int:
        """All FLOPs of the step."""
        return sum(self.matmul_flops.values()) + sum(self.attention_flops.values())

    def scaled(self, factor: float) -> Work:
        """So many times this work."""
        return Work(*(_map(getattr(self, one.name), lambda value: round(value * factor)) for one in fields(self)))

    def __add__(self, other: Work) -> Work:
        return Work(*(_join(getattr(self, one.name), getattr(other, one.name), 1) for one in fields(self)))

    def __sub__(self, other: Work) -> Work:
        return Work(*(_join(getattr(self, one.name), getattr(other, one.name), -1) for one in fields(self)))


def _map(value: Any, change: Callable[[int], int]) -> Any:
    return {key: change(one) for key, one in value.items()} if isinstance(value, dict) else change(value)


def _join(left: Any, right: Any, sign: int) -> Any:
    if isinstance(left, dict):
        return {key: left.get(key, 0) + sign * right.get(key, 0) for key in dict.fromkeys([*left, *right])}
    return left + sign * right


@dataclass(frozen=True)
class Account:
    """One training step of rank 0 at the widest batch, run on tensors without contents; bytes are per rank.

    peak_bytes, breakdown_bytes, peak_phase, phase_peak_bytes: as `measure.memory.LiveStorage` counts them.
    estimation_peak_bytes: peak of what the method computes from data before training; None where it computes nothing.
    weights_bytes:         the model as it is loaded, before it is sharded.
    dequantised_bytes:     the largest 4-bit weight unpacked: scratch inside of a CUDA kernel, which no operator shows.
    gathered_bytes:        the two largest FSDP units unsharded: what NCCL has in flight.
    work, optimizer:       all micro-batches of a step, and what follows them.
    collectives:           one row per collective and group, see `distributed.communication`.
    notes:                 what is modelled rather than run.
    """

    batch: BatchShape
    peak_bytes: int
    peak_phase: str
    breakdown_bytes: dict[str, int]
    phase_peak_bytes: dict[str, int]
    estimation_peak_bytes: int | None
    weights_bytes: int
    dequantised_bytes: int
    gathered_bytes: int
    total_parameters: int
    trainable_parameters: int
    work: Work
    optimizer: Work
    collectives: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def communication_bytes(self) -> int:
        """Payload of all collectives of a step."""
        return sum(row["payload_bytes"] for row in self.collectives)

    @property
    def sent_bytes(self) -> int:
        """What this rank sends at least for them."""
        return sum(row["sent_bytes"] for row in self.collectives)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Account:
        """Read what `to_dict` gave; KeyError or TypeError for anything else."""
        known = {name: values[name] for name in (one.name for one in fields(cls))}
        return cls(
            **known
            | {
                "batch": BatchShape(**values["batch"]),
                "work": Work(**values["work"]),
                "optimizer": Work(**values["optimizer"]),
                "collectives": tuple(values["collectives"]),
                "notes": tuple(values["notes"]),
            }
        )


@dataclass(frozen=True)
class Data:
    """What is known of a run's training data before it runs; None where nothing is.

    batch:       the widest micro-batch that may come: of the tokenised rows, else of max_length.
    mean_width:  mean columns of a micro-batch, padding included; tokens_per_step: real tokens, over all devices.
    steps:       optimizer steps of the run.
    num_labels:  classes of a classification.
    tokenised:   whether the lengths are those of the data.
    """

    batch: BatchShape
    mean_width: float
    steps: int | None
    tokens_per_step: float | None
    num_labels: int | None
    tokenised: bool


@dataclass(frozen=True)
class Prediction:
    """A run on a device. Bytes are those of the rank that needs most; None is what is not known.

    peak_bytes:          tensors at the peak of training; `estimation_peak_bytes` is that of the method's start.
    device_peak_bytes:   what the device must have for one process: the higher peak, with context, workspaces,
                         buffers of collectives and fragmentation where it is a GPU; the peak itself on a CPU.
    host_peak_bytes:     main memory of one process.
    memory_bytes:        what the device has.
    seconds_*:           the whole run, its start included; step_seconds_*: one optimizer step.
    flops_per_step:      of all devices together, recomputation included, at the mean width of a batch.
    energy_*, cost_*:    all devices, from power limit and price of the hardware file.
    """

    run: str
    device: str
    peak_bytes: int | None = None
    breakdown_bytes: dict[str, int] = field(default_factory=dict)
    phase_peak_bytes: dict[str, int] = field(default_factory=dict)
    device_breakdown_bytes: dict[str, int] = field(default_factory=dict)
    device_peak_bytes: int | None = None
    host_peak_bytes: int | None = None
    memory_bytes: int | None = None
    estimation_peak_bytes: int | None = None
    flops_per_step: int | None = None
    communication_bytes_per_step: int | None = None
    communication_sent_bytes_per_step: int | None = None
    steps: int | None = None
    step_seconds_low: float | None = None
    step_seconds_high: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    tokens_per_step: float | None = None
    energy_joules_low: float | None = None
    energy_joules_high: float | None = None
    cost_low: float | None = None
    cost_high: float | None = None
    currency: str | None = None
    verdict: Verdict = "unknown"
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the run fits the device; None where nobody knows."""
        return {"fits": True, "tight": True, "cannot": False, "unknown": None}[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the names that programs ask for."""
        return asdict(self) | {"predicted_peak_bytes": self.peak_bytes, "fits": self.fits}
