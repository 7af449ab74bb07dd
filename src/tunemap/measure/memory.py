"""Memory of a training step: bytes alive in tensors by category, the counts of allocator and driver, the host peak.

The headline on a CPU and in the planner is `LiveStorage`, which follows every tensor storage from birth to death:
resident-set size is not faithful there, because malloc keeps freed pages (it can even invert a ranking).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)

from tunemap.measure.nvml import driver_process_bytes

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "other")

# What a storage is taken for when an operator makes it in this phase of the step. Backward counts as
# activations too: recomputed ones and the gradients with respect to activations.
_CATEGORY_OF_PHASE = {
    "forward": "activations",
    "backward": "activations",
    "optimizer": "optimizer",
    "other": "other",
}

# bitsandbytes keeps the scales of a quantised weight beside its storage: Params4bit.quant_state (a QuantState,
# nested by `state2` with double quantisation), Int8Params.CB and SCB.
_SCALE_ATTRIBUTES = ("quant_state", "state2", "absmax", "code", "offset", "CB", "SCB")

_REDUCE_SCATTER = torch.ops.c10d._reduce_scatter_base_.default  # what FSDP calls


@dataclass
class _Storage:
    bytes: int
    category: str
    reference: weakref.ref[torch.UntypedStorage]


class LiveStorage(TorchDispatchMode):
    """Follows the tensor storages alive on one device during one training step, each counted once.

    Categories (CATEGORIES): *parameters* are parameters, buffers and quantisation scales; *gradients* are the
    `.grad` of parameters; *optimizer* is its state and what its step allocates; *activations* is what forward
    and backward allocate; *other* is the rest (the batch, DDP's buckets). Works on real and on fake tensors; for
    the latter enter it inside the FakeTensorMode. Costs about 10 ms a step: never in timed steps.

    Seen: every result of an operator, every storage that an operator reads (one that this class has not met was
    there before the step, and is counted from its start), storages that FSDP resizes. Not seen: scratch inside a
    kernel or a collective, tensors that nobody touches during the step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        block_bytes: int = 1,
    ) -> None:
        """Follow `model`'s device. Sizes are rounded up to `block_bytes` (CUDA's caching allocator: 512)."""
        super().__init__()
        self._model = model
        self._optimizer = optimizer
        self._block_bytes = block_bytes
        self._device_type = next((p.device.type for p in model.parameters()), "cpu")
        self._phase = "other"
        self._alive: dict[int, _Storage] = {}
        self._scratch: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._scratch_bytes = 0  # of the copy that the next operator may read
        self._current_bytes = 0
        self._by_category = dict.fromkeys(CATEGORIES, 0)
        self._end_bytes: int | None = None
        self._hooks: list[Any] = []
        self.reset_peak()

    # -- results ---------------------------------------------------------------------------------------------

    @property
    def peak_allocated_bytes(self) -> int:
        """The most bytes alive at once since entry or `reset_peak`."""
        return self._peak_bytes

    @property
    def peak_phase(self) -> str:
        """The phase in which that peak was reached."""
        return self._peak_phase

    @property
    def breakdown_bytes(self) -> dict[str, int]:
        """Bytes by category at the moment of the peak; they sum to `peak_allocated_bytes`."""
        return dict(self._peak_by_category)

    @property
    def phase_peak_bytes(self) -> dict[str, int]:
        """The most bytes alive at once within each phase that allocated anything."""
        return dict(self._phase_peaks)

    @property
    def live_bytes(self) -> int:
        """Bytes alive now."""
        return self._current_bytes

    @property
    def end_allocated_bytes(self) -> int:
        """Bytes alive when the tracker was left (now, while it is open)."""
        return self._current_bytes if self._end_bytes is None else self._end_bytes

    def reset_peak(self) -> None:
        """Forget the peak: count from what is alive now (for a second step under one tracker)."""
        self._peak_bytes = self._current_bytes
        self._peak_by_category = dict(self._by_category)
        self._peak_phase = self._phase
        self._phase_peaks: dict[str, int] = {}

    # -- use -------------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute what the body allocates to phase `name`: forward, backward or optimizer."""
        if name not in _CATEGORY_OF_PHASE:
            raise ValueError(f"unknown phase {name!r}: {', '.join(_CATEGORY_OF_PHASE)}")
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer
            self._name_what_the_model_holds()

    def __enter__(self) -> LiveStorage:
        self._name_what_the_model_holds()
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._name_gradient))
        self._patch_resize()
        self.reset_peak()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._original_resize  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._end_bytes = self._current_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # let DTensor and the like run; their operators on local tensors come here
        kwargs = kwargs or {}
        read = list(_tensors_in((args, kwargs)))
        if self._scratch_bytes:
            self._leave_out_scratch(read)
        for tensor in read:
            self._meet(tensor)
        result = func(*args, **kwargs)
        if func is _REDUCE_SCATTER:
            self._scratch_bytes = args[1].nbytes
        category = _CATEGORY_OF_PHASE[self._phase]
        for tensor in _tensors_in(result):
            self._follow(tensor, category)
        return result

    # -- the account -----------------------------------------------------------------------------------------

    def _follow(self, tensor: torch.Tensor, category: str) -> None:
        """Count the storage of `tensor`, new or resized; a known one keeps its category."""
        if tensor.device.type == self._device_type:
            self._count(tensor.untyped_storage(), category)

    def _count(self, storage: torch.UntypedStorage, category: str) -> None:
        key = storage._cdata
        if key in self._scratch:
            return
        known = self._alive.get(key)
        now_bytes = self._rounded(storage.nbytes())
        if known is None:
            if now_bytes == 0:
                return
            reference = weakref.ref(storage, lambda _: self._drop(key))
            self._alive[key] = _Storage(now_bytes, category, reference)
            self._add(category, now_bytes)
        elif known.bytes != now_bytes:
            change, known.bytes = now_bytes - known.bytes, now_bytes
            self._add(known.category, change)

    def _meet(self, tensor: torch.Tensor) -> None:
        """An operator reads `tensor`: if its storage is new to us, it was there all along."""
        if tensor.device.type != self._device_type or tensor.untyped_storage()._cdata in self._alive:
            return
        before = self._current_bytes
        peak, by_category = self._peak_bytes, self._peak_by_category
        phase, phase_peaks = self._peak_phase, self._phase_peaks
        self._follow(tensor, "other")
        extra = self._current_bytes - before
        self._peak_bytes, self._peak_phase = peak + extra, phase
        self._peak_by_category = {**by_category, "other": by_category["other"] + extra}
        self._phase_peaks = {name: reached + extra for name, reached in phase_peaks.items()}

    def _leave_out_scratch(self, read: list[torch.Tensor]) -> None:
        """The operator after a reduction over shards: with gloo it takes its part out of the reduced copy.

        That copy of all gradients, made where no operator shows it, lives as long as the collective. Met like any other
        storage it would count as there all along, one such copy for every block, and as alive until gloo's own thread
        has let go of it.
        """
        for storage in (tensor.untyped_storage() for tensor in read):
            key = storage._cdata
            if key not in self._alive and storage.nbytes() == self._scratch_bytes:
                self._scratch[key] = weakref.ref(storage, lambda _, key=key: self._scratch.pop(key))  # type: ignore[misc]
        self._scratch_bytes = 0

    def _rename(self, tensor: torch.Tensor, category: str) -> None:
        """Count the storages of `tensor` (inner ones of a wrapper) under `category` from now on."""
        for inner in _unwrapped(tensor):
            self._follow(inner, category)
            known = self._alive.get(inner.untyped_storage()._cdata)
            if known is not None and known.category != category:
                self._by_category[known.category] -= known.bytes
                self._by_category[category] += known.bytes
                known.category = category

    def _name_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._rename(parameter.grad, "gradients")

    def _name_what_the_model_holds(self) -> None:
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            self._rename(tensor, "parameters")
            for scale in _scales_of(tensor):
                self._rename(scale, "parameters")
        for parameter in self._model.parameters():
            self._name_gradient(parameter)
        if self._optimizer is not None:
            for state in self._optimizer.state.values():
                for tensor in _tensors_in([_held(value) for value in state.values()]):
                    self._rename(tensor, "optimizer")

    def _patch_resize(self) -> None:
        """FSDP frees and regrows the gathered parameters by `UntypedStorage.resize_`, which no operator shows."""
        self._original_resize = original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage.device.type in (self._device_type, "meta"):  # fake storages say meta
                self._count(storage, "parameters")
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]

    def _drop(self, key: int) -> None:
        gone = self._alive.pop(key)
        self._add(gone.category, -gone.bytes)

    def _add(self, category: str, change_bytes: int) -> None:
        self._by_category[category] += change_bytes
        self._current_bytes += change_bytes
        if self._current_bytes > self._phase_peaks.get(self._phase, 0):
            self._phase_peaks[self._phase] = self._current_bytes
        if self._current_bytes > self._peak_bytes:
            self._peak_bytes = self._current_bytes
            self._peak_by_category = dict(self._by_category)
            self._peak_phase = self._phase

    def _rounded(self, size_bytes: int) -> int:
        return -(-size_bytes // self._block_bytes) * self._block_bytes


def track_live_storage(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, *, block_bytes: int = 1
) -> LiveStorage:
    """A tracker to put around exactly one training step, which should not be the first (it has no optimizer state).

    ::

        with track_live_storage(model, optimizer) as tracker:
            with tracker.phase("forward"):
                loss = model(**batch).loss
            with tracker.phase("backward"):
                loss.backward()
            with tracker.phase("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
        tracker.peak_allocated_bytes, tracker.breakdown_bytes
    """
    return LiveStorage(model, optimizer, block_bytes=block_bytes)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples and dictionaries; of sparse ones those that hold their indices and values."""
    if isinstance(value, torch.Tensor):
        yield from (value._indices(), value._values()) if value.layout == torch.sparse_coo else (value,)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)


def _held(value: Any) -> Any:
    """The attributes of an object that is no tensor, such as GaLore's projector; any other value itself."""
    return vars(value) if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor) else value


def _unwrapped(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the data of a wrapper subclass (DTensor, torchao); the tensor itself if it is none."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            inner = getattr(tensor, name)
            if isinstance(inner, torch.Tensor):
                yield from _unwrapped(inner)
    else:
        yield tensor


def _scales_of(holder: Any) -> Iterator[torch.Tensor]:
    """The tensors that a quantised weight keeps as attributes."""
    attributes = getattr(holder, "__dict__", {})
    for name in _SCALE_ATTRIBUTES:
        value = attributes.get(name)
        if isinstance(value, torch.Tensor):
            yield value
        elif value is not None:
            yield from _scales_of(value)


@dataclass(frozen=True)
class MemorySnapshot:
    """CUDA's caching allocator, in bytes: what tensors hold and what it has reserved. None where there is none."""

    allocated_bytes: int | None
    reserved_bytes: int | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None


def memory_snapshot(device: Any) -> MemorySnapshot:
    """The allocator's counts now and at their peaks since `reset_peaks`; all None on a CPU."""
    if torch.device(device).type != "cuda":
        return MemorySnapshot(None, None, None, None)
    return MemorySnapshot(
        allocated_bytes=torch.cuda.memory_allocated(device),
        reserved_bytes=torch.cuda.memory_reserved(device),
        peak_allocated_bytes=torch.cuda.max_memory_allocated(device),
        peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
    )


def release_unused(device: Any) -> None:
    """Give the device back what the allocator keeps of freed tensors: of loading and of a method's estimation."""
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def peaks_until_now(device: Any, earlier: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a resumed run must know of its memory: on a CPU what the tracker saw, on a GPU the peaks of all processes.

    earlier: the same of the processes before this one.
    """
    snapshot, known = memory_snapshot(device), earlier or {}
    if snapshot.peak_allocated_bytes is None:
        return earlier
    peaks = ("peak_allocated_bytes", "peak_reserved_bytes")
    return {name: max(getattr(snapshot, name), known.get(name, 0)) for name in peaks}


def reset_peaks(device: Any) -> None:
    """Start the peaks of training: the allocator's and the host's. Call after loading, before the first step."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    reset_host_rss_peak()


_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def host_rss_peak_bytes() -> int | None:
    """Peak resident set of this process in bytes (VmHWM of proc(5)) since its start or the reset; None off Linux."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def reset_host_rss_peak() -> bool:
    """Bring VmHWM down to the present resident set (writing 5 to clear_refs, proc(5)); False if not permitted."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class MemoryRecord:
    """The memory columns of one rank's result, in bytes; a quantity that was not measured is None, never zero.

    peak_allocated_bytes, end_allocated_bytes: bytes in tensors, at the peak of training and at its end: the
        allocator's on CUDA, the tracker's on a CPU.
    peak_reserved_bytes: what the caching allocator took from the device. None on a CPU.
    driver_process_bytes: what the driver counts for this process, CUDA context included.
    host_rss_peak_bytes: peak resident set of the process; a second number, never the headline.
    parameters_bytes to other_bytes: the tracker's categories at the peak of its step.
    """

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    end_allocated_bytes: int | None = None
    driver_process_bytes: int | None = None
    host_rss_peak_bytes: int | None = None
    parameters_bytes: int | None = None
    gradients_bytes: int | None = None
    optimizer_bytes: int | None = None
    activations_bytes: int | None = None
    other_bytes: int | None = None


def memory_record(device: Any, tracker: LiveStorage | None = None) -> MemoryRecord:
    """Gather the columns now (end of training, before evaluation), with the breakdown of `tracker` if there is one."""
    snapshot = memory_snapshot(device)
    breakdown = tracker.breakdown_bytes if tracker else {}
    on_device = snapshot.allocated_bytes is not None
    return MemoryRecord(
        peak_allocated_bytes=snapshot.peak_allocated_bytes
        if on_device
        else (tracker.peak_allocated_bytes if tracker else None),
        peak_reserved_bytes=snapshot.peak_reserved_bytes,
        end_allocated_bytes=snapshot.allocated_bytes
        if on_device
        else (tracker.end_allocated_bytes if tracker else None),
        driver_process_bytes=driver_process_bytes(device),
        host_rss_peak_bytes=host_rss_peak_bytes(),
        **{f"{category}_bytes": breakdown.get(category) for category in CATEGORIES},
    )
