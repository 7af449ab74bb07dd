"""The fingerprint of where a result was made: packages, source, CPU, GPUs, driver, threads; no user or host name."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunemap.measure.nvml import ask, handle_of, nvml, text, visible_handles

PACKAGES = (
    "tunemap", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers",
    "safetensors", "numpy", "scipy", "statsmodels", "pandas", "snakemake", "triton", "flash-attn",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cublas-cu12", "nvidia-cublas", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "nvidia-ml-py",
)  # fmt: skip

# Variables that change speed, memory or the last bits. Only these are ever written down: the environment of a
# cluster job also holds tokens and names.
ENVIRONMENT_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_MODULE_LOADING", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_AVOID_RECORD_STREAMS",
    "NCCL_ALGO", "NCCL_PROTO", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL",
    "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE", "NCCL_NVLS_ENABLE", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY", "KMP_BLOCKTIME", "MKL_NUM_THREADS", "MKL_DYNAMIC", "OPENBLAS_NUM_THREADS", "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "PYTHONHASHSEED", "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """Everything about the machine and the software that a reader needs to trust or to repeat a number.

    packages: name → version, of those in PACKAGES that are installed.
    git: {"commit", "dirty"} of the repository root, None when it is not a checkout.
    source_digest: `digest_sources` of the package, so that an uncommitted change shows.
    cpu: model, cores, cores this process may use, memory in bytes.
    gpus: one entry per visible GPU, see `gpu_description`.
    gpu_links: how each pair of GPUs is connected, "0-1": "NV12" style NVLink count or PCIe level.
    cuda: driver, the CUDA version that the driver supports, the one that torch was built for.
    threads: torch's threads if it is loaded, and the CPUs this process may use.
    variables: the allow-listed environment variables that are set.
    """

    python: str
    system: str
    packages: dict[str, str]
    git: dict[str, Any] | None
    source_digest: str
    cpu: dict[str, Any]
    gpus: list[dict[str, Any]]
    gpu_links: dict[str, str]
    cuda: dict[str, str | None]
    threads: dict[str, int | None]
    variables: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The fingerprint as JSON-able data."""
        return asdict(self)


def environment(repository: Path | None = None) -> Environment:
    """Take the fingerprint now. `repository`: the root whose git state belongs to the result."""
    with nvml() as library:
        handles = visible_handles(library) if library else []
        gpus = [gpu_description(library, handle) for handle in handles]
        gpu_links = _gpu_links(library, handles)
        cuda = _cuda_versions(library)
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=package_versions(PACKAGES),
        git=git_state(repository) if repository else None,
        source_digest=package_digest(),
        cpu=cpu_description(),
        gpus=gpus,
        gpu_links=gpu_links,
        cuda=cuda,
        threads=_threads(),
        variables={name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ},
    )


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions from the packages' metadata, nothing imported; absent packages are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_state(root: Path) -> dict[str, Any] | None:
    """{"commit": full hash, "dirty": whether tracked files differ or new ones are there}.

    None if `root` is not itself the top of a checkout (a folder inside somebody else's does not count), if it
    has no commit, or without git.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": git("status", "--porcelain") != ""}
    except (OSError, subprocess.SubprocessError):
        return None


def digest_sources(root: Path, patterns: Iterable[str] = ("**/*.py",)) -> str:
    """SHA-256 over the relative names and contents of the files under `root` that match, in sorted order."""
    files = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def package_digest() -> str:
    """`digest_sources` of this package as installed."""
    return digest_sources(Path(__file__).resolve().parents[1])


def cpu_description() -> dict[str, Any]:
    """Model name, physical and logical cores, cores this process may use, memory in bytes."""
    import psutil

    return {
        "model": _cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def usable_cores() -> int:
    """CPUs that this process may run on (its affinity), not those the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def gpu_description(library: Any, handle: Any) -> dict[str, Any]:
    """One GPU by NVML: identity, limits and its present state. What the driver does not tell is None.

    The state (clocks, throttle reasons, temperature, processes) is what the gate on a device of our own reads:
    `throttle_reasons` is NVML's bit mask (nvmlClocksEventReasons*), `process_ids` who computes on it.
    """
    memory = ask(library, "nvmlDeviceGetMemoryInfo", handle)
    capability = ask(library, "nvmlDeviceGetCudaComputeCapability", handle)
    limit_mw = ask(library, "nvmlDeviceGetEnforcedPowerLimit", handle)
    mig = ask(library, "nvmlDeviceGetMigMode", handle)
    processes = ask(library, "nvmlDeviceGetComputeRunningProcesses", handle)
    return {
        "name": text(ask(library, "nvmlDeviceGetName", handle)),
        "memory_bytes": memory.total if memory else None,
        "compute_capability": f"{capability[0]}.{capability[1]}" if capability else None,
        "power_limit_w": limit_mw / 1000 if limit_mw is not None else None,
        "sm_clock_mhz": ask(library, "nvmlDeviceGetClockInfo", handle, library.NVML_CLOCK_SM),
        "sm_clock_max_mhz": ask(library, "nvmlDeviceGetMaxClockInfo", handle, library.NVML_CLOCK_SM),
        "memory_clock_mhz": ask(library, "nvmlDeviceGetClockInfo", handle, library.NVML_CLOCK_MEM),
        "memory_clock_max_mhz": ask(library, "nvmlDeviceGetMaxClockInfo", handle, library.NVML_CLOCK_MEM),
        "temperature_c": ask(library, "nvmlDeviceGetTemperature", handle, library.NVML_TEMPERATURE_GPU),
        "throttle_reasons": ask(library, "nvmlDeviceGetCurrentClocksThrottleReasons", handle),
        "ecc": ask(library, "nvmlDeviceGetCurrentEccMode", handle),
        "mig": mig[0] if mig else None,
        "pcie_generation": ask(library, "nvmlDeviceGetCurrPcieLinkGeneration", handle),
        "pcie_width": ask(library, "nvmlDeviceGetCurrPcieLinkWidth", handle),
        "process_ids": [process.pid for process in processes] if processes is not None else None,
    }


def device_state(device: Any) -> dict[str, Any] | None:
    """`gpu_description` of one torch device now; None for a CPU or without a driver."""
    with nvml() as library:
        handle = handle_of(library, device) if library else None
        return gpu_description(library, handle) if handle is not None else None


# nvmlGpuTopologyLevel_t, in the words of `nvidia-smi topo -m`
_TOPOLOGY_LEVELS: dict[Any, str] = {0: "same board", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}


def _gpu_links(library: Any, handles: list[Any]) -> dict[str, str]:
    """Each pair's connection: the number of NVLinks of the lower-numbered GPU if they have any, else the PCIe level."""
    links = {}
    for first, first_handle in enumerate(handles):
        for second in range(first + 1, len(handles)):
            level = ask(library, "nvmlDeviceGetTopologyCommonAncestor", first_handle, handles[second])
            peer = ask(
                library, "nvmlDeviceGetP2PStatus", first_handle, handles[second], library.NVML_P2P_CAPS_INDEX_NVLINK
            )
            nvlinks = _active_nvlinks(library, first_handle) if peer == library.NVML_P2P_STATUS_OK else 0
            links[f"{first}-{second}"] = f"NV{nvlinks}" if nvlinks else _TOPOLOGY_LEVELS.get(level, "unknown")
    return links


def _active_nvlinks(library: Any, handle: Any) -> int:
    states = (ask(library, "nvmlDeviceGetNvLinkState", handle, link) for link in range(library.NVML_NVLINK_MAX_LINKS))
    return sum(state == library.NVML_FEATURE_ENABLED for state in states)


def _cuda_versions(library: Any) -> dict[str, str | None]:
    supported = ask(library, "nvmlSystemGetCudaDriverVersion_v2") if library else None
    torch = sys.modules.get("torch")
    return {
        "driver": text(ask(library, "nvmlSystemGetDriverVersion")) if library else None,
        "driver_supports": f"{supported // 1000}.{supported % 1000 // 10}" if supported else None,
        "torch_built_for": torch.version.cuda if torch else None,
    }


def _threads() -> dict[str, int | None]:
    """Never imports torch for the answer: a run that measures has it loaded."""
    torch = sys.modules.get("torch")
    return {
        "torch": torch.get_num_threads() if torch else None,
        "torch_interop": torch.get_num_interop_threads() if torch else None,
        "usable_cores": usable_cores(),
    }


def _compute_threads() -> int:
    """torch's threads if it is loaded, else what it would start with: OMP_NUM_THREADS or the usable cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return _threads()["torch"] or (int(asked) if asked.isdigit() else usable_cores())


# Of `gpu_description`, what does not change from minute to minute.
_CONSTANTS = ("name", "memory_bytes", "power_limit_w", "sm_clock_max_mhz", "memory_clock_max_mhz", "mig")


def device_name(device: Any) -> str:
    """The driver's name of a GPU; `cpu` for a processor."""
    with nvml() as library:
        handle = handle_of(library, device) if library else None
        return gpu_description(library, handle)["name"] if handle is not None else "cpu"


def device_fingerprint(device: Any) -> str:
    """A short digest of what decides the speed of one device.

    A GPU: name, memory, power limit, greatest clocks, partitioning, driver. A CPU: model, usable cores and
    compute threads. The version of torch in both.
    """
    facts: list[Any] = [package_versions(["torch"])]
    with nvml() as library:
        handle = handle_of(library, device) if library else None
        if handle is not None:
            description = gpu_description(library, handle)
            facts += [*(description[name] for name in _CONSTANTS), _cuda_versions(library)["driver"]]
        else:
            facts += [str(device).partition(":")[0], _cpu_model(), usable_cores(), _compute_threads()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
