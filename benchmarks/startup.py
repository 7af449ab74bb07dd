"""What a run takes besides its steps: start of the processes, imports, model and data, end; ours beside others'.

    python benchmarks/startup.py                              # prints two tables; a quarter of an hour
    python benchmarks/startup.py --peers trainer --rounds 3
    python benchmarks/startup.py --output benchmarks/results/startup-cpu.json

runs      Each contestant of peers.py trains the smallest workload there twice: few steps, and many. A straight line
          through both is what no step would take. Of TuneMap the whole command of the rule `train` is measured, with
          launcher, gates, records, checksums and outcome; the others keep nothing, not even the model. The Trainer
          starts in TRL's environment where that is installed: in ours transformers and peft import what only we need.
imports   torch, transformers and peft, imported plainly, with the garbage collector paused, and in the way of
          `tunemap.startup.quick_imports`, which leaves torch's compiler and scipy out as well and lets transformers
          read its models' sources once.

All take turns, in another order each round; ratios are taken within a round. Environments of peers: make peers-install.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from typing import Any

from contestants.workload import Workload
from paired import mean_of_rounds, shown, time_left
from peers import HERE, SIZES, prepared
from race import (
    CONTESTANTS,
    NOT_INSTALLED,
    OWN,
    RECOMMENDED,
    command_of,
    environment_of,
    is_installed,
    orders,
    python_of,
)

from tunemap.measure.environment import environment

REPOSITORY = HERE.parent
FEW, MANY = 4, 34  # steps
IMPORT = "import torch, transformers, peft"
IMPORTS = {
    "plain": IMPORT,
    "without garbage collection": f"import gc; gc.disable(); {IMPORT}",
    "as a run does": f"from tunemap.startup import quick_imports\nwith quick_imports(): {IMPORT}",
}
Cost = dict[str, float]  # wall_s, cpu_s


def spent(command: list[Any], **options: Any) -> Cost:
    """Seconds of a command and of all its processes, by the clock and of the processor."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, **options)
    if ended.returncode:
        sys.exit(f"{ended.stderr}\n{command[0]} {command[1]} failed")
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall_s": wall_s, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def our_command(folder: Path, scratch: Path) -> list[Any]:
    """What the rule `train` runs."""
    command = [sys.executable, REPOSITORY / "workflow" / "scripts" / "train_run.py", "--device", "cpu"]
    command += ["--spec", (folder / "run.json").read_text()]
    for name in ("model", "dataset", "tokens"):
        command += [f"--{name}", folder / name]
    for name in ("work", "weights", "steps.csv", "outcome.json"):
        command += [f"--{name.partition('.')[0]}", scratch / name]
    return command


def their_command(name: str, folder: Path, result: Path, environments: Path) -> list[Any]:
    """What starts another contestant, each where its users would have it."""
    command = command_of(name, folder, result, environments)
    if environment_name(name, environments) == "trl":
        command[0] = python_of("trl", environments)
    return command


def environment_name(name: str, environments: Path) -> str:
    """Whose environment a contestant starts in; PEFT's loop needs bitsandbytes, as ours has it."""
    if name == "trainer" and is_installed("trl", environments):
        return "trl"
    return name if CONTESTANTS[name].requirements else OWN


def run_once(name: str, folder: Path, environments: Path) -> Cost:
    """Train as a contestant does, to its end."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        known = environment_of(name, Workload.load(folder), environments)
        if name != OWN:
            return spent(their_command(name, folder, place / "result.json", environments), env=known, cwd=place)
        cost = spent(our_command(folder, place), env=known, cwd=place)
        outcome = json.loads((place / "outcome.json").read_text())
        assert outcome["outcome"] == "ok", outcome["reason"]
        return cost


def besides_steps(name: str, few: Path, many: Path, environments: Path) -> Cost:
    """Seconds of a run that has no step."""
    short, long = (run_once(name, folder, environments) for folder in (few, many))
    return {clock: short[clock] - FEW * (long[clock] - short[clock]) / (MANY - FEW) for clock in short}


def costs_in_turns(names: list[str], measure: Callable[[str], Cost], rounds: int) -> dict[str, list[Cost]]:
    """What `measure` says of each name in each round."""
    found: dict[str, list[Cost]] = {name: [] for name in names}
    began = time.perf_counter()
    for turn, order in enumerate(orders(names, rounds), start=1):
        for name in order:
            found[name].append(measure(name))
            seconds = f"{found[name][-1]['wall_s']:6.2f} s, processor {found[name][-1]['cpu_s']:6.2f} s"
            print(f"  round {turn}/{rounds}  {name:28s} {seconds}", flush=True)
        print(f"  {time_left(began, turn, rounds)}", flush=True)
    return found


def summary(found: dict[str, list[Cost]], reference: str) -> list[dict[str, Any]]:
    """Medians, and what each takes of the reference's processor time."""
    cpu_s = {name: [cost["cpu_s"] for cost in costs] for name, costs in found.items()}
    return [
        {
            "name": name,
            "wall_s": statistics.median(cost["wall_s"] for cost in costs),
            "cpu_s": statistics.median(cpu_s[name]),
            "cpu_time_ratio": mean_of_rounds(list(map(truediv, cpu_s[name], cpu_s[reference]))),
            "rounds": len(costs),
        }
        for name, costs in found.items()
    ]


def runs(method: str, peers: list[str], environments: Path, rounds: int) -> list[dict[str, Any]]:
    """Rows of the contestants for one method."""
    size = SIZES["cpu"]["small"]
    short, long = (
        Workload("small", method, steps, size.rows, size.length, 1e-4, 16, 32, 1, "cpu", "float32")
        for steps in (FEW, MANY)
    )
    with prepared([short]) as (few,), prepared([long]) as (many,):
        found = costs_in_turns([OWN, *peers], lambda name: besides_steps(name, few, many, environments), rounds)
    return [
        {"method": method, "environment": environment_name(row["name"], environments), **row}
        for row in summary(found, OWN)
    ]


def imports(rounds: int) -> list[dict[str, Any]]:
    """Rows of the ways to import."""
    found = costs_in_turns(list(IMPORTS), lambda way: spent([sys.executable, "-c", IMPORTS[way]]), rounds)
    return summary(found, "plain")


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [name for name in CONTESTANTS if name not in (OWN, RECOMMENDED)]
    parser.add_argument("--peers", nargs="*", choices=others, default=others)
    parser.add_argument("--environments", type=Path, default=HERE / "environments", help="where the peers' are")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="json file to keep the results in")
    parser.add_argument("--note", help="what a reader of the results must know of their making; kept with them")
    arguments = parser.parse_args()
    environments = arguments.environments.resolve()
    peers = [name for name in arguments.peers if is_installed(name, environments)]
    for name in arguments.peers:
        if name not in peers:
            print(f"{name} does not run: {NOT_INSTALLED}")
    print("imports", flush=True)
    found: dict[str, Any] = {"imports": imports(arguments.rounds), "runs": []}
    for method in ("full", "lora"):
        print(method, flush=True)
        found["runs"] += runs(method, peers, environments, arguments.rounds)
    for row in [*found["imports"], *found["runs"]]:
        ratio, seconds = row["cpu_time_ratio"], f"{row['wall_s']:6.2f} s, processor {row['cpu_s']:6.2f} s"
        print(f"{row.get('method', 'imports'):8s} {row['name']:28s} {seconds}  {shown(ratio, 2)}")
    if arguments.output:
        kept = found | {"note": arguments.note, "environment": environment(REPOSITORY).as_dict()}
        arguments.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
