"""How long all facts of a trace take, and how much memory, as the trace grows.

    python benchmarks/extraction.py                       # 0.5, 1 and 5 million kernels
    python benchmarks/extraction.py --full                # 20 million as well (2 GB of disk, minutes to generate), kept
                                                          # in benchmarks/results/extraction-cpu.json
    python benchmarks/extraction.py --full --peers PYTHON # and beside nsys-ai and HolisticTraceAnalysis, kept in
                                                          # benchmarks/results/extraction-peers-cpu.json
    python benchmarks/extraction.py --trace FILE          # any trace of your own
    python benchmarks/extraction.py --peers PYTHON        # the peers alone; kept with --json FILE

Each line is one fresh process that reads the file and computes every fact: wall time, processor time and the peak of
its resident memory, imports included. The generated file has 4 processes that all call their GPU device 0, 2 API calls
for 5 kernels, copies on 9 % of the segments, phases, and a backward pass launched from another thread. The result is
compared with the generator's truth, exactly.

`--peers` needs the python of an environment of its own:
    pip install nsys-ai==0.3.0 HolisticTraceAnalysis==0.5.0 "pandas<3"    # HolisticTraceAnalysis fails with pandas 3
All tools get the same events, and what they say is compared with the truth: compute and idle time summed over the
ranks. nsys-ai's idle counts copies as idle, by its definition.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tunemap.files import write_json
from tunemap.measure.environment import environment

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
KEPT, KEPT_PEERS = RESULTS / "extraction-cpu.json", RESULTS / "extraction-peers-cpu.json"
GENERATOR = REPOSITORY / "tests" / "unit" / "trace"
MILLION = 1_000_000
TARGET_KERNELS, TARGET_S, TARGET_MB = 5 * MILLION, 10, 1000

_CHILD = """
import json, resource, sys, time
from pathlib import Path
begin = time.perf_counter()
from tunemap.trace.command import read_traces
from tunemap.trace.facts import compute_facts
trace = read_traces([Path(p) for p in sys.argv[1:]])
read = time.perf_counter()
facts = compute_facts(trace)
end = time.perf_counter()
usage = resource.getrusage(resource.RUSAGE_SELF)
# not ru_maxrss: a child inherits that of the process that started it
peak_kib = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print(json.dumps({
    "kernels": len(trace.kernels), "calls": len(trace.calls), "copies": len(trace.copies),
    "read_s": read - begin, "facts_s": end - read, "total_s": end - begin,
    "processor_s": usage.ru_utime + usage.ru_stime, "peak_bytes": 1024 * peak_kib,
    "devices": facts.summary["devices"],
}))
"""


_NSYS_AI = """
import json, sys, time
begin = time.perf_counter()
from nsys_ai import profile
from nsys_ai.overlap import overlap_analysis
opened = profile.open(sys.argv[1])
found = [overlap_analysis(opened, device) for device in json.loads(sys.argv[2])]
compute = sum(r["compute_only_ms"] + r["overlap_ms"] for r in found)
idle = sum(r["idle_ms"] for r in found)
"""

_HTA = """
import sys, time
begin = time.perf_counter()
from hta.trace_analysis import TraceAnalysis
analysis = TraceAnalysis(trace_files=dict(enumerate(sys.argv[1:])))
table = analysis.get_temporal_breakdown(visualize=False)
analysis.get_comm_comp_overlap(visualize=False)
compute, idle = table["compute_time(us)"].sum() / 1e3, table["idle_time(us)"].sum() / 1e3
"""

_OURS = """
import sys, time
from pathlib import Path
begin = time.perf_counter()
from tunemap.trace.command import read_traces
from tunemap.trace.facts import compute_facts
devices = compute_facts(read_traces([Path(p) for p in sys.argv[1:]])).summary["devices"]
compute, idle = (sum(d[name] for d in devices) / 1e6 for name in ("compute_ns", "idle_ns"))
"""

_REPORT = """
end = time.perf_counter()
peak_kib = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
import json
print("RESULT " + json.dumps([end - begin, 1024 * peak_kib, compute, idle]))
"""


def compare_peers(python: str, kernels: int) -> list[dict]:
    """What each tool says about the same events, how fast, and how far from the truth; printed as it goes."""
    import trace_generator

    rows = []
    print(f"{'tool':<26} {'input':<30} {'s':>7} {'peak MB':>8} {'compute ms':>12} {'idle ms':>10}   off by (ms)")
    for collide in (False, True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            ranks = trace_generator.generate(kernels, steps=20, collide=collide)
            nsys, kineto = folder / "report.sqlite", [folder / f"rank{rank.index}.json.gz" for rank in ranks]
            trace_generator.write_nsys(nsys, ranks)
            for rank, path in zip(ranks, kineto, strict=True):
                trace_generator.write_kineto(path, rank, len(ranks))
            truth = [sum(rank.truth[key] for rank in ranks) / 1e6 for key in ("compute_ns", "idle_ns")]
            place = "every rank says GPU 0" if collide else "GPU 0 to 3"
            devices = json.dumps(sorted({rank.device for rank in ranks}))
            for tool, script, arguments, kind in (
                ("tunemap", _OURS, [nsys], "nsys"),
                ("nsys-ai", _NSYS_AI, [nsys, devices], "nsys"),
                ("tunemap", _OURS, kineto, "Kineto"),
                ("HolisticTraceAnalysis", _HTA, kineto, "Kineto"),
            ):
                ours = script is _OURS
                done = subprocess.run(
                    [sys.executable if ours else python, "-c", script + _REPORT, *map(str, arguments)],
                    capture_output=True,
                    text=True,
                    env={"PYTHONPATH": str(REPOSITORY / "src") if ours else "", "PATH": "/usr/bin:/bin", "HOME": name,
                         "OMP_NUM_THREADS": "1", "HTA_DISABLE_NS_ROUNDING": "1"},
                )  # fmt: skip
                result = next((r for r in done.stdout.splitlines() if r.startswith("RESULT ")), None)
                head = f"{tool:<26} {kind + ', ' + place:<30}"
                row = {"tool": tool, "input": f"{kind}, {place}", "kernels": kernels}
                if result is None:
                    rows.append(row | {"failure": (done.stderr.strip().splitlines() or ["no message"])[-1]})
                    print(f"{head} failed: {rows[-1]['failure']}")
                    continue
                seconds, peak, compute, idle = json.loads(result.removeprefix("RESULT "))
                off = f"compute {compute - truth[0]:+.3f}, idle {idle - truth[1]:+.3f}"
                print(f"{head} {seconds:>7.2f} {peak / 1e6:>8.0f} {compute:>12.3f} {idle:>10.3f}   {off}", flush=True)
                said = {"total_s": seconds, "peak_bytes": peak, "compute_ms": compute, "idle_ms": idle}
                rows.append(row | said | {"true_compute_ms": truth[0], "true_idle_ms": truth[1]})
    return rows


def measure(paths: list[Path]) -> dict:
    """One fresh process over these files."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(REPOSITORY / "src"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def line(result: dict, file_mb: float) -> str:
    counts = f"{result['kernels']:>12,} {result['calls']:>11,} {result['copies']:>9,} {file_mb:>8,.0f}"
    times = f"{result['read_s']:>7.2f} {result['facts_s']:>8.2f} {result['total_s']:>8.2f}"
    return f"{counts} {times} {result['processor_s']:>10.2f} {result['peak_bytes'] / 1e6:>8.0f}"


def measure_sizes(sizes: list[int], repeat: int) -> Iterator[dict]:
    """The fastest of `repeat` runs at each size, compared with the generator's truth; printed as it goes."""
    import trace_generator

    for kernels in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.sqlite"
            begin = time.perf_counter()
            ranks = trace_generator.generate(kernels, kernels * 2 // 5, steps=100, collide=True)
            trace_generator.write_nsys(path, ranks)
            truth = [rank.truth for rank in ranks]
            del ranks
            generated = time.perf_counter() - begin
            best = min((measure([path]) for _ in range(repeat)), key=lambda r: r["total_s"])
            file_mb = path.stat().st_size / 1e6
        print(line(best, file_mb), f"  (generated in {generated:.0f} s)", flush=True)
        for device, expected in zip(best.pop("devices"), truth, strict=True):
            for name, value in expected.items():
                found = device.get(name, device["launch"].get(name))
                assert found == value, f"{name} of pid {device['pid']}: {found} instead of {value}"
        yield {"asked_kernels": kernels, **best, "file_mb": file_mb}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", type=float, nargs="+", default=[0.5, 1, 5], metavar="MILLION")
    parser.add_argument("--full", action="store_true", help=f"20 million kernels as well; kept in {KEPT.name}")
    parser.add_argument("--trace", type=Path, nargs="+", help="measure these files instead of generated ones")
    parser.add_argument(
        "--peers",
        metavar="PYTHON",
        help=f"python of an environment with the peers; with --full kept in {KEPT_PEERS.name}",
    )
    parser.add_argument("--peer-kernels", type=float, default=0.1, metavar="MILLION")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each size; the fastest counts")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    sys.path.insert(0, str(GENERATOR))
    kept: dict = {"environment": environment(REPOSITORY).as_dict(), "sizes": [], "peers": []}

    def keep(file: Path, part: str) -> None:
        if args.json:
            write_json(args.json, kept)
        elif args.full:
            write_json(file, {name: kept[name] for name in ("environment", part)})

    head = (
        f"{'kernels':>12} {'API calls':>11} {'copies':>9} {'file MB':>8} {'read s':>7} {'facts s':>8} {'total s':>8} "
    )
    head += f"{'CPU s':>10} {'peak MB':>8}"
    if args.trace:
        print(head)
        print(line(measure(args.trace), sum(p.stat().st_size for p in args.trace) / 1e6))
        return 0
    missed = False
    if args.full or not args.peers:
        print(head)
        sizes = [round(size * MILLION) for size in [*args.kernels, *([20] if args.full else [])]]
        for result in measure_sizes(sizes, args.repeat):
            kept["sizes"].append(result)
            keep(KEPT, "sizes")  # at once: the next size takes minutes
            slow = result["total_s"] > TARGET_S or result["peak_bytes"] > TARGET_MB * 1e6
            missed |= result["asked_kernels"] == TARGET_KERNELS and slow
        said = f"every figure equals the generator's truth; target at 5 million: {TARGET_S} s and {TARGET_MB} MB"
        measured = TARGET_KERNELS in sizes
        print(said, f"({'missed' if missed else 'met'})" if measured else "(not measured)")
    if args.peers:
        kept["peers"] = compare_peers(args.peers, round(args.peer_kernels * MILLION))
        keep(KEPT_PEERS, "peers")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
