"""Traces with exactly known truth, written as nsys SQLite and as Kineto JSON, small for tests and big for benchmarks.

The truth does not come from interval algebra. A device's time is a row of segments; for each segment it is drawn
whether computation, communication and copies are active. Each active class gets one event that ends with its segment
and may begin inside the one before (when that is active too), as work on another stream does. So the length of every
part of the partition is a sum of segment lengths, and an event accounts for exactly its own segment.

Phases are a fixed grid of steps; the phase of a launch is arithmetic on its time. The backward pass is launched from
another thread than its range, a loader thread has `data` ranges during the forward pass, and correlation ids start at
1 in every process.

usage: python trace_generator.py OUT.sqlite [--kernels 5000000] [--calls 2000000] [--processes 4] [--copies 400000]
"""

import argparse
import gzip
import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# (full name, category, weight, mean microseconds)
COMPUTE = [
    ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_64x3_tn", "gemm", 14, 30),
    ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", "gemm", 8, 40),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_256x64_nn>(T1::Params)", "gemm", 4, 0),
    ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128>>(flash::Flash_fwd_params)", "attention", 3, 90),
    ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>(int, T2)", "elementwise", 22, 9),
    ("void at::native::elementwise_kernel<128, 4, at::native::[lambda(int)]>(int, T3)", "elementwise", 14, 8),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(T3)", "reduce", 5, 10),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>(int)", "norm", 4, 12),
    ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8>(float *, unsigned char *)", "dequantize", 6, 30),
    ("void (anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>(T1)", "optimizer", 4, 45),
    ("void (anonymous namespace)::softmax_warp_forward<float>(T2 *)", "softmax", 2, 15),
]  # fmt: skip
COLLECTIVE = [
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096>)", "allreduce", 5, 0),
    ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096>)", "allgather", 4, 0),
    ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096>)", "reducescatter", 3, 0),
    ("ncclDevKernel_Broadcast_RING_LL(ncclDevKernelArgsStorage<4096>)", "broadcast", 1, 0),
]  # fmt: skip
NAMES = [entry[0] for entry in COMPUTE + COLLECTIVE]
CATEGORIES = [entry[1] for entry in COMPUTE] + ["communication"] * len(COLLECTIVE)
PHASES = ["data", "forward", "backward", "optimizer", "unattributed"]
# (nsys copyKind, source memory, target memory, name in Kineto, kind in our tables, scope)
COPIES = [
    (1, 1, 2, "Memcpy HtoD (Pinned -> Device)", "htod", "host"),
    (2, 2, 0, "Memcpy DtoH (Device -> Pageable)", "dtoh", "host"),
    (8, 2, 2, "Memcpy DtoD (Device -> Device)", "dtod", "local"),
    (10, 2, 2, "Memcpy PtoP (Device -> Device)", "ptop", "peer"),
    (100, 2, 2, "Memset (Device)", "memset", "local"),
]
LAUNCH, LAUNCH_COPY, SYNC = "cudaLaunchKernel", "cudaMemcpyAsync", "cudaStreamSynchronize"
SECRET = "s3cret-token-hunter2"
USER = "alice-the-user"
_EPOCH = 10_000_000_000
# active classes (compute, communication, copy) of a segment and their probabilities
_ACTIVE = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)
_PROBABILITY = np.array([0.74, 0.12, 0.03, 0.015, 0.03, 0.04, 0.01, 0.015])
EVENTS_PER_SEGMENT = float((_ACTIVE[:, :2].sum(axis=1) * _PROBABILITY).sum())


@dataclass(frozen=True)
class Events:
    """Columns of events of one class of one rank."""

    start: np.ndarray
    end: np.ndarray
    name: np.ndarray  # into NAMES, or into COPIES
    correlation: np.ndarray
    wall: np.ndarray
    phase: np.ndarray  # into PHASES


@dataclass(frozen=True)
class Rank:
    """Everything one process did, and the truth about it."""

    index: int
    pid: int
    device: int
    kernels: Events
    copies: Events
    copy_bytes: np.ndarray
    calls: dict[str, np.ndarray]  # start, end, tid, correlation, name (0 launch, 1 copy, 2 sync)
    ranges: list[tuple[int, int, str, int]]  # start, end, name, tid
    truth: dict[str, int]


def generate(
    kernels: int = 4000,
    calls: int | None = None,
    processes: int = 4,
    copies: float = 1.0,
    steps: int = 7,
    seed: int = 1,
    collide: bool = False,
) -> list[Rank]:
    """About `kernels` kernels in all; the first `calls` launches are in the capture (all by default)."""
    share = None if calls is None else calls / kernels
    return [_rank(kernels // processes, share, g, steps, seed, collide, copies) for g in range(processes)]


def _rank(count: int, share: float | None, g: int, steps: int, seed: int, collide: bool, copy_rate: float) -> Rank:
    rng = np.random.default_rng([seed, g])
    pid = 1000 + 7 * g
    main, autograd, loader = pid, pid + 300, pid + 301
    segments = max(8, int(count / EVENTS_PER_SEGMENT))
    active = _ACTIVE[rng.choice(len(_ACTIVE), segments, p=_PROBABILITY)].copy()
    active[:, 2] &= rng.random(segments) < copy_rate
    active[[0, -1]] = [True, False, False]
    length = np.maximum(1, rng.lognormal(9.0, 1.0, segments)).astype(np.int64)
    end = _EPOCH + g * 137_000 + np.cumsum(length)
    start = end - length
    begin = int(start[0])
    base = begin - 1_000_000
    step_ns = -(-(int(end[-1]) - base + 1) // steps)

    def phase_at(time: np.ndarray) -> np.ndarray:
        offset = (time - base) % step_ns
        code = np.full(len(time), 4)
        for phase, (a, b) in enumerate(_grid(step_ns), start=1):
            code[(offset >= a) & (offset < b)] = phase
        return code

    def events(column: int, first: int, weights: list[int], stop: int) -> tuple[np.ndarray, ...]:
        at = np.flatnonzero(active[:, column])
        earlier = np.zeros(len(at), np.int64)
        follows = (at > 0) & active[at - 1, column]
        earlier[follows] = rng.integers(0, length[at[follows] - 1])
        name = first + rng.choice(stop - first, len(at), p=np.array(weights) / sum(weights))
        return start[at] - earlier, end[at], name, at

    compute = events(0, 0, [e[2] for e in COMPUTE], len(COMPUTE))
    comm = events(1, len(COMPUTE), [e[2] for e in COLLECTIVE], len(NAMES))
    k_start, k_end, k_name = (np.concatenate([a, b]) for a, b in zip(compute[:3], comm[:3], strict=True))
    k_wall = np.concatenate([length[compute[3]], np.where(active[comm[3], 0], 0, length[comm[3]])])
    c_start, c_end, c_kind, c_at = events(2, 0, [3, 2, 4, 2, 1], len(COPIES))
    c_wall = np.where(active[c_at, 0] | active[c_at, 1], 0, length[c_at])

    order = np.argsort(k_start, kind="stable")
    correlation = np.empty(len(k_start), np.int64)
    correlation[order] = np.arange(1, len(order) + 1)
    launched = correlation <= (len(order) if share is None else int(share * len(order)))
    c_correlation = np.arange(len(order) + 1, len(order) + 1 + len(c_start))
    k_called = k_start - rng.integers(3_000, 900_000, len(k_start))
    c_called = c_start - rng.integers(3_000, 900_000, len(c_start))
    k_phase = np.where(launched, phase_at(k_called), 4)
    c_phase = phase_at(c_called)
    sync = base + np.arange(1, steps + 1) * step_ns - 1000
    called = np.concatenate([k_called[launched], c_called, sync])
    call_phase = np.concatenate([k_phase[launched], c_phase, np.full(steps, 4)])
    calls = {
        "start": called,
        "end": called + np.concatenate([rng.integers(2_000, 9_000, len(called) - steps), np.full(steps, 900)]),
        "tid": np.where(call_phase == 2, autograd, main),
        "correlation": np.concatenate(
            [correlation[launched], c_correlation, np.arange(steps) + len(order) + len(c_start) + 1]
        ),
        "name": np.repeat([0, 1, 2], [int(launched.sum()), len(c_start), steps]),
    }
    ranges = []
    for k in range(steps):
        zero = base + k * step_ns
        ranges.append((zero, zero + step_ns, f"train_step {k}", main))
        for phase, (a, b) in zip(PHASES[1:4], _grid(step_ns), strict=True):
            ranges.append((zero + a, zero + b, phase, main))
        ranges.append((zero + step_ns // 20, zero + step_ns // 4, "data", loader))

    has_compute, has_comm, has_copy = active.T
    truth = {
        "window_ns": int(length.sum()),
        "compute_ns": int(length[has_compute].sum()),
        "communication_ns": int(length[has_comm].sum()),
        "overlap_ns": int(length[has_comm & has_compute].sum()),
        "exposed_communication_ns": int(length[has_comm & ~has_compute].sum()),
        "copy_ns": int(length[has_copy].sum()),
        "exposed_copy_ns": int(length[has_copy & ~has_comm & ~has_compute].sum()),
        "idle_ns": int(length[~has_copy & ~has_comm & ~has_compute].sum()),
        "kernel_count": len(k_start),
        "kernel_time_sum_ns": int((k_end - k_start).sum()),
        "communication_time_sum_ns": int((comm[1] - comm[0]).sum()),
        "matched_count": int(launched.sum()),
        "latency_sum_ns": int((k_start - k_called)[launched].sum()),
    }
    return Rank(
        g, pid, 0 if collide else g,
        Events(k_start, k_end, k_name, correlation, k_wall, k_phase),
        Events(c_start, c_end, c_kind, c_correlation, c_wall, c_phase),
        rng.integers(4, 96_000_000, len(c_start)), calls, ranges, truth,
    )  # fmt: skip


def _grid(step_ns: int) -> list[tuple[int, int]]:
    """forward, backward, optimizer within a step."""
    return [
        (0, step_ns * 33 // 100),
        (step_ns * 34 // 100, step_ns * 90 // 100),
        (step_ns * 91 // 100, step_ns * 99 // 100),
    ]


# -- truth as tables -------------------------------------------------------------------------------------------


def true_phases(rank: Rank) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(phase, category) -> (count, time_ns, wall_ns)."""
    k = rank.kernels
    rows: dict[tuple[str, str], tuple[int, int, int]] = {}
    for phase in range(len(PHASES)):
        for name, category in enumerate(CATEGORIES):
            own = (k.phase == phase) & (k.name == name)
            if own.any():
                key = (PHASES[phase], category)
                before = rows.get(key, (0, 0, 0))
                add = int(own.sum()), int((k.end - k.start)[own].sum()), int(k.wall[own].sum())
                rows[key] = tuple(a + b for a, b in zip(before, add, strict=True))  # type: ignore[assignment]
    return rows


def true_kernels(rank: Rank) -> dict[str, tuple[int, int, int]]:
    """name -> (count, time_ns, wall_ns)."""
    k = rank.kernels
    return {
        NAMES[name]: (int(own.sum()), int((k.end - k.start)[own].sum()), int(k.wall[own].sum()))
        for name in range(len(NAMES))
        if (own := k.name == name).any()
    }


def true_copies(rank: Rank) -> dict[tuple[str, str, str], tuple[int, int, int, int]]:
    """(kind, scope, phase) -> (count, bytes, time_ns, wall_ns)."""
    c = rank.copies
    return {
        (COPIES[kind][4], COPIES[kind][5], PHASES[phase]): (
            int(own.sum()), int(rank.copy_bytes[own].sum()), int((c.end - c.start)[own].sum()), int(c.wall[own].sum()),
        )
        for kind in range(len(COPIES))
        for phase in range(len(PHASES))
        if (own := (c.name == kind) & (c.phase == phase)).any()
    }  # fmt: skip


# -- nsys ------------------------------------------------------------------------------------------------------

_KERNEL_COLUMNS = (
    "start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL DEFAULT 1, "
    "{green}streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL, "
    "shortName INTEGER NOT NULL, mangledName INTEGER, launchType INTEGER DEFAULT 1, cacheConfig INTEGER DEFAULT 0, "
    "registersPerThread INTEGER NOT NULL DEFAULT 128, gridX INTEGER NOT NULL DEFAULT 64, "
    "gridY INTEGER NOT NULL DEFAULT 1, "
    "gridZ INTEGER NOT NULL DEFAULT 1, blockX INTEGER NOT NULL DEFAULT 256, blockY INTEGER NOT NULL DEFAULT 1, "
    "blockZ INTEGER NOT NULL DEFAULT 1, staticSharedMemory INTEGER NOT NULL DEFAULT 0, "
    "dynamicSharedMemory INTEGER NOT NULL DEFAULT 49152, localMemoryPerThread INTEGER NOT NULL DEFAULT 0, "
    "localMemoryTotal INTEGER NOT NULL DEFAULT 0, gridId INTEGER NOT NULL DEFAULT 0, sharedMemoryExecuted INTEGER, "
    "graphNodeId INTEGER, sharedMemoryLimitConfig INTEGER{extra}"
)
_COPY_COLUMNS = (
    "start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL DEFAULT 1, "
    "{green}streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL, "
)


def write_nsys(path: Path, ranks: list[Rank], version: int = 2025, shuffle: int | None = None) -> None:
    """One report with every rank in it, in the schema of that year; `shuffle` is the seed of the row order."""
    database = sqlite3.connect(path)
    database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-200000;")
    green = "greenContextId INTEGER, " if version >= 2024 else ""
    extra = ", graphId INTEGER, clusterX INTEGER" if version >= 2026 else ""
    meta = "META_DATA_EXPORT" if version >= 2024 else "EXPORT_META_DATA"
    database.executescript(
        f"""CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
        CREATE TABLE {meta} (name TEXT NOT NULL, value TEXT);
        CREATE TABLE META_DATA_CAPTURE (name TEXT NOT NULL, value TEXT);
        CREATE TABLE TARGET_INFO_SYSTEM_ENV (globalVid INTEGER, devStateName TEXT, name TEXT, nameEnum INTEGER,
          value TEXT);
        CREATE TABLE PROCESSES (globalPid INTEGER, pid INTEGER, name TEXT);
        CREATE TABLE ThreadNames (nameId INTEGER NOT NULL, priority INTEGER, globalTid INTEGER);
        CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL ({_KERNEL_COLUMNS.format(green=green, extra=extra)});
        CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY ({_COPY_COLUMNS.format(green=green)}copyKind INTEGER NOT NULL,
          srcKind INTEGER, dstKind INTEGER, srcDeviceId INTEGER, dstDeviceId INTEGER, graphNodeId INTEGER);
        CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET ({_COPY_COLUMNS.format(green=green)}value INTEGER, memKind INTEGER);
        CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL,
          eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL,
          returnValue INTEGER NOT NULL, callchainId INTEGER);
        CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, text TEXT,
          globalTid INTEGER, textId INTEGER, domainId INTEGER);"""
    )
    strings: dict[str, int] = {}

    def string(text: str) -> int:
        return strings.setdefault(text, 3 * len(strings) + 5)

    name_id = np.array([string(name) for name in NAMES])
    api_id = np.array([string(f"{name}_v{7000 + i}") for i, name in enumerate((LAUNCH, LAUNCH_COPY, SYNC))])
    for rank in ranks:
        rng = None if shuffle is None else np.random.default_rng([shuffle, rank.index])
        global_pid = (1 << 48) | (rank.pid << 24)

        def insert(table: str, columns: dict[str, Any], rng: Any = rng) -> None:
            length = max(len(v) for v in columns.values() if isinstance(v, np.ndarray))
            order = slice(None) if rng is None else rng.permutation(length)
            full = [(v[order] if isinstance(v, np.ndarray) else np.full(length, v)).tolist() for v in columns.values()]
            marks = ",".join("?" * len(columns))
            sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
            database.executemany(sql, zip(*full, strict=True))

        k, c = rank.kernels, rank.copies
        insert(
            "CUPTI_ACTIVITY_KIND_KERNEL",
            {
                "start": k.start, "end": k.end, "deviceId": rank.device,
                "streamId": np.where(k.name < len(COMPUTE), 7, 16), "correlationId": k.correlation,
                "globalPid": global_pid, "demangledName": name_id[k.name], "shortName": name_id[k.name],
            },
        )  # fmt: skip
        kind = np.array([entry[0] for entry in COPIES])[c.name]
        copied = kind != 100
        common = {
            "start": c.start, "end": c.end, "streamId": np.full(len(kind), 9), "correlationId": c.correlation,
            "bytes": rank.copy_bytes,
        }  # fmt: skip
        same = {"deviceId": rank.device, "globalPid": global_pid}
        if copied.any():
            insert(
                "CUPTI_ACTIVITY_KIND_MEMCPY",
                {name: v[copied] for name, v in common.items()} | same | {
                    "copyKind": kind[copied],
                    "srcKind": np.array([entry[1] for entry in COPIES])[c.name][copied],
                    "dstKind": np.array([entry[2] for entry in COPIES])[c.name][copied],
                    "srcDeviceId": rank.device,
                    "dstDeviceId": np.where(kind[copied] == 10, peer_of(rank, len(ranks)), rank.device),
                },
            )  # fmt: skip
        if (~copied).any():
            insert("CUPTI_ACTIVITY_KIND_MEMSET", {n: v[~copied] for n, v in common.items()} | same | {"memKind": 2})
        calls = rank.calls
        insert(
            "CUPTI_ACTIVITY_KIND_RUNTIME",
            {
                "start": calls["start"], "end": calls["end"], "eventClass": 0,
                "globalTid": (global_pid | calls["tid"]), "correlationId": calls["correlation"],
                "nameId": api_id[calls["name"]], "returnValue": 0,
            },
        )  # fmt: skip
        rows = rank.ranges if rng is None else [rank.ranges[i] for i in rng.permutation(len(rank.ranges))]
        for i, (start, end, text, tid) in enumerate(rows):  # half of the ranges are registered strings
            by_id = i % 2 == 1
            database.execute(
                "INSERT INTO NVTX_EVENTS (start, end, eventType, text, globalTid, textId) VALUES (?,?,?,?,?,?)",
                (
                    start,
                    end,
                    59 if i % 3 else 60,
                    None if by_id else text,
                    global_pid | tid,
                    string(text) if by_id else None,
                ),
            )
        database.execute("INSERT INTO PROCESSES VALUES (?,?,?)", (global_pid, rank.pid, f"/home/{USER}/bin/python3"))
        database.execute(
            "INSERT INTO ThreadNames VALUES (?,?,?)", (string(f"{USER}-thread"), 20, global_pid | rank.pid)
        )
    string(f"HOME=/home/{USER}\x00HF_TOKEN={SECRET}")
    database.executemany("INSERT INTO StringIds VALUES (?,?)", [(v, k) for k, v in strings.items()])
    database.execute(
        "INSERT INTO META_DATA_CAPTURE VALUES ('PROCESS_0:ENVIRONMENT_VARIABLE', ?)", (f"HF_TOKEN={SECRET}",)
    )
    database.execute("INSERT INTO META_DATA_CAPTURE VALUES ('PROCESS_0:USER_NAME', ?)", (USER,))
    database.execute(
        "INSERT INTO TARGET_INFO_SYSTEM_ENV VALUES (0, 'Env', 'DeviceEnvironment', 0, CAST(? AS TEXT))",
        (b"HF_TOKEN=" + SECRET.encode() + b"\xff\xfe",),
    )
    database.execute(f"INSERT INTO {meta} VALUES ('EXPORT_PRODUCT_VERSION', ?)", (f"{version}.1",))
    database.commit()
    database.close()


def peer_of(rank: Rank, count: int) -> int:
    """The device that a peer copy goes to; never the rank's own."""
    return (rank.device + 1) % max(2, count)


# -- Kineto ----------------------------------------------------------------------------------------------------


def write_kineto(path: Path, rank: Rank, count: int, shuffle: int | None = None) -> None:
    """One rank of `count` as torch.profiler writes it, gzip if the name ends in .gz."""
    events: list[str] = []

    def add(category: str, name: str, pid: int, tid: int, start: int, end: int, args: dict[str, Any]) -> None:
        events.append(
            f'{{"ph": "X", "cat": "{category}", "name": {json.dumps(name)}, "pid": {pid}, "tid": {tid}, '
            f'"ts": {start // 1000}.{start % 1000:03d}, "dur": {(end - start) // 1000}.{(end - start) % 1000:03d}, '
            f'"args": {json.dumps(args)}}}'
        )

    k, c, calls = rank.kernels, rank.copies, rank.calls
    for start, end, name, correlation in zip(
        *(v.tolist() for v in (k.start, k.end, k.name, k.correlation)), strict=True
    ):
        stream = 7 if name < len(COMPUTE) else 16
        args = {"device": rank.device, "stream": stream, "correlation": correlation, "External id": correlation}
        add("kernel", NAMES[name], rank.device, stream, start, end, args)
    for start, end, kind, correlation, size in zip(
        *(v.tolist() for v in (c.start, c.end, c.name, c.correlation, rank.copy_bytes)), strict=True
    ):
        args = {"device": rank.device, "stream": 9, "correlation": correlation, "bytes": size}
        if COPIES[kind][5] == "peer":
            args |= {"fromDevice": rank.device, "toDevice": peer_of(rank, count)}
        category = "gpu_memset" if COPIES[kind][0] == 100 else "gpu_memcpy"
        add(category, COPIES[kind][3], rank.device, 9, start, end, args)
    for start, end, tid, correlation, name in zip(
        *(calls[key].tolist() for key in ("start", "end", "tid", "correlation", "name")), strict=True
    ):
        add("cuda_runtime", (LAUNCH, LAUNCH_COPY, SYNC)[name], rank.pid, tid, start, end, {"correlation": correlation})
    for start, end, name, tid in rank.ranges:
        add("user_annotation", name, rank.pid, tid, start, end, {})
    events.append(
        f'{{"ph": "M", "name": "process_name", "pid": {rank.pid}, "args": {{"name": "/home/{USER}/python"}}}}'
    )
    if shuffle is not None:
        events = [events[i] for i in np.random.default_rng(shuffle).permutation(len(events))]
    text = (
        f'{{"schemaVersion": 1, "username": "{USER}", "host_name": "{SECRET}", "deviceProperties": [], '
        '"traceEvents": [\n' + ",\n".join(events) + f'\n], "traceName": "/home/{USER}/t.json"}}'
    )
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kernels", type=int, default=5_000_000)
    parser.add_argument("--calls", type=int, default=2_000_000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    write_nsys(args.out, generate(args.kernels, args.calls, args.processes, steps=args.steps))


if __name__ == "__main__":
    main()
