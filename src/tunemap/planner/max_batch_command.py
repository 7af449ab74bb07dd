"""`tunemap max-batch`: the largest batch or length of a run that a device holds.

tunemap max-batch tiny-qwen2.arithmetic.lora.seed-0 --gpu rtx4090
tunemap max-batch tiny-qwen2.arithmetic.lora.seed-0 --memory-gb 2 --factor max_length --probe
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from tunemap.errors import UserError, refuse_outside
from tunemap.hardware import load_hardware
from tunemap.inspect import RESULTS, plan_of, run_of, study_argument
from tunemap.paths import expanded
from tunemap.planner.cache import target_of
from tunemap.planner.device import MOST_GB, Target
from tunemap.planner.largest import FACTORS, Largest, Probe, confirmed, largest_planned, most_of, probe_run


def add_max_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap max-batch`."""
    parser.add_argument("run", help="id of the run, as `tunemap plan` prints it")
    study_argument(parser, option=True)
    parser.add_argument("--factor", choices=FACTORS, default=FACTORS[0], help="what to enlarge (default: %(default)s)")
    parser.add_argument("--gpu", help="a file in resources/hardware, such as rtx4090 (default: the study's device)")
    parser.add_argument("--memory-gb", type=float, help="memory that may be used, in GB (default: all of the device)")
    parser.add_argument(
        "--probe", action="store_true", help="then train a few steps here, and say what really fits this device"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results (default: results)")


def run_max_batch(arguments: argparse.Namespace) -> int:
    """Search, probe if asked, and say what was found."""
    if arguments.memory_gb is not None:
        refuse_outside("--memory-gb", arguments.memory_gb, MOST_GB)
    if arguments.gpu and arguments.probe:
        raise UserError("--probe runs on this machine's device: leave --gpu out, and limit it by --memory-gb")
    plan = plan_of(arguments)
    run = run_of(plan, arguments.run)
    if run.is_base:
        raise UserError(f"{run.id} is the base model, which is not trained")
    hardware = plan.study.hardware
    target = target_of(hardware.device, hardware.description)
    if arguments.gpu:
        target = Target.gpu(load_hardware(arguments.gpu))
    if arguments.memory_gb:
        target = replace(target, memory_bytes=round(arguments.memory_gb * 1e9))

    def say(value: int) -> None:
        if not arguments.json:
            print(f"planning {arguments.factor} {value}", flush=True)

    data_root = Path(expanded(plan.study.data_root))
    found = largest_planned(run, arguments.factor, target, data_root=data_root, results=arguments.results, progress=say)
    if arguments.probe:

        def probe(value: int) -> Probe:
            return probe_run(
                run, arguments.factor, value, target, results=arguments.results, device_kind=hardware.device
            )

        found = confirmed(found, probe, most=most_of(run, arguments.factor, data_root, arguments.results))
    print(json.dumps(asdict(found), indent=1) if arguments.json else in_words(found))
    return 0


def in_words(found: Largest) -> str:
    """What was found, for a person."""
    gib = 1 << 30
    memory = f"{found.memory_bytes / gib:.2f} GiB of {found.device}"
    if found.tight == 0:
        return f"{found.run}: not even {found.factor} 1 fits: it needs {found.tight_bytes / gib:.2f} of {memory}"
    lines = [
        f"{found.run} on {memory}",
        f"  safe:  {found.factor} {found.safe} needs {found.safe_bytes / gib:.2f} GiB",
        f"  tight: {found.factor} {found.tight} needs {found.tight_bytes / gib:.2f} GiB",
    ]
    for one in found.probes:
        peak = "" if one.peak_bytes is None else f", peak {one.peak_bytes / gib:.2f} GiB"
        lines.append(f"  probe: {found.factor} {one.value}: {one.outcome}{peak}{'' if one.held else ', too much'}")
    if found.confirmed is not None:
        lines.append(f"  largest that ran: {found.factor} {found.confirmed}")
    return "\n".join(lines)
