"""The matmul ceiling: the most FLOP/s that a matrix product reaches on this very device, beside the datasheet.

tunemap ceiling                                  # this machine's GPU, or its CPU with one thread
tunemap ceiling --device cpu --threads 4
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import read_json, write_json
from tunemap.measure.clock import StepClock
from tunemap.measure.environment import device_fingerprint, device_name

DTYPES = ("float32", "tfloat32", "bfloat16", "float16")

# Square products n × n × n. Large enough to fill the device, small enough for seconds of measuring.
_SIZES = {"cuda": (2048, 4096, 8192, 16384), "cpu": (512, 1024, 2048)}
_LIMIT_S = 4.0
_MAX_REPEATS = 100


@dataclass(frozen=True)
class Ceiling:
    """flops_per_s: 2 n³ over the best time of one product of two n × n matrices of `dtype`, n = size."""

    dtype: str
    flops_per_s: float
    size: int
    repeats: int


def measure_ceiling(device: Any, dtype: str, *, limit_s: float = _LIMIT_S) -> Ceiling:
    """The best of all sizes and repeats, within about `limit_s` seconds.

    dtype: one of DTYPES. "tfloat32" is float32 storage multiplied in TF32 (CUDA), "float32" forbids that.
    Raises UserError for another dtype, or one that this device cannot multiply.
    """
    import torch

    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    kind = torch.device(device).type
    if dtype == "tfloat32" and kind != "cuda":
        raise UserError("dtype 'tfloat32' exists on CUDA devices only")
    storage = torch.float32 if dtype == "tfloat32" else getattr(torch, dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tfloat32" else "highest")
    try:
        sizes = _SIZES[kind]
        found = [_best_of(torch, device, storage, dtype, size, limit_s / len(sizes)) for size in sizes]
    except (RuntimeError, KeyError) as error:
        raise UserError(f"device {device!s} cannot multiply {dtype} matrices: {error}") from None
    finally:
        torch.set_float32_matmul_precision(before)
    return max(found, key=lambda ceiling: ceiling.flops_per_s)


def _best_of(torch: Any, device: Any, storage: Any, dtype: str, size: int, limit_s: float) -> Ceiling:
    """Repeat one product until `limit_s` is spent (at least twice after a warm-up) and keep the best time."""
    left = torch.randn(size, size, device=device).to(storage)
    right = torch.randn(size, size, device=device).to(storage)
    out = torch.empty_like(left)
    clock = StepClock(device)
    torch.mm(left, right, out=out)
    best_s, repeats, deadline = float("inf"), 0, time.perf_counter() + limit_s
    while repeats < 2 or (repeats < _MAX_REPEATS and time.perf_counter() < deadline):
        clock.begin(repeats)
        torch.mm(left, right, out=out)
        clock.end()
        best_s = min(best_s, clock.flush()[0].step_time_s)
        repeats += 1
    return Ceiling(dtype=dtype, flops_per_s=2 * size**3 / best_s, size=size, repeats=repeats)


def load(path: Path, device: Any) -> dict[str, Ceiling]:
    """The ceilings stored for this device, by dtype; empty if the file or the device's entry is not there."""
    if not path.exists():
        return {}
    return {dtype: Ceiling(**entry) for dtype, entry in _of_device(read_json(path), device).items()}


def store(path: Path, device: Any, ceiling: Ceiling) -> None:
    """Keep `ceiling` under this device's fingerprint and name, beside other devices and dtypes in the same file."""
    stored = read_json(path) if path.exists() else {}
    known = _of_device(stored, device) | {ceiling.dtype: asdict(ceiling)}
    stored[device_fingerprint(device)] = {"device": device_name(device), "ceilings": known}
    write_json(path, stored)


def _of_device(stored: dict[str, Any], device: Any) -> dict[str, Any]:
    return stored.get(device_fingerprint(device), {}).get("ceilings", {})


STORED = Path("results/shared/ceilings.json")


def add_ceiling_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tunemap ceiling`."""
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads, as the factor threads_per_process of the runs to compare with (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=STORED, help="file to add the ceilings of this device to (default: %(default)s)"
    )


def run_ceiling(args: argparse.Namespace) -> int:
    """Measure every dtype that the device can multiply, print and store it."""
    import torch

    if args.threads < 1:
        raise UserError(f"--threads {args.threads}: allowed are 1 and more")
    torch.set_num_threads(args.threads)
    device = _device(torch, args.device)
    for dtype in DTYPES:
        if dtype == "tfloat32" and device.type != "cuda":
            continue
        try:
            ceiling = measure_ceiling(device, dtype)
        except UserError as error:
            print(f"{dtype:>10}  {error}")
            continue
        store(args.output, device, ceiling)
        speed = f"{ceiling.flops_per_s / 1e12:8.3f} TFLOP/s"
        print(f"{dtype:>10}  {speed}  best of {ceiling.repeats} products of {ceiling.size} × {ceiling.size}")
    print(f"stored in {args.output} for device {device_fingerprint(device)} ({device})")
    return 0


def _device(torch: Any, name: str) -> Any:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: allowed are auto, cpu, cuda, cuda:N") from None
    if device.type not in _SIZES:
        raise UserError(f"--device {name}: allowed are auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine shows {torch.cuda.device_count()} GPUs to torch")
    return device
