"""Stands in for train_run.py where only scheduling is looked at: says where it ran, and ends as it is told.

behaviour.json: method name -> {"sleep": seconds, "needs_mb": memory that it must have been given, "code": exit code}.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import tunemap.training.launch  # noqa: F401  what the workflow declares as source stays the same

parser = argparse.ArgumentParser()
for name in ("spec", "device", "model", "dataset", "tokens", "work", "weights", "steps", "outcome", "ceilings"):
    parser.add_argument(f"--{name}")
parser.add_argument("--attempts-left", type=int)
arguments = parser.parse_args()
spec = json.loads(arguments.spec)
behaviour = json.loads(Path("behaviour.json").read_text()).get(spec["method_name"], {})
job = os.environ["SLURM_JOB_ID"]
report = Path("stub") / f"{spec['id']}.{job}.json"
report.parent.mkdir(exist_ok=True)
said = {
    "run": spec["id"],
    "job": job,
    "node": os.environ.get("SLURMD_NODENAME"),
    "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    "threads": os.environ.get("OMP_NUM_THREADS"),
    "attempts_left": arguments.attempts_left,
    "learning_rate": spec["factors"]["learning_rate"],
    "began": time.time(),
    "ended": None,
}
report.write_text(json.dumps(said))
time.sleep(behaviour.get("sleep", 0))
attempt_fails = arguments.attempts_left > 0 and behaviour.get("fails_first", False)
report.write_text(json.dumps(said | {"ended": time.time()}))
if attempt_fails:
    sys.exit(7)
Path(arguments.weights).mkdir(parents=True, exist_ok=True)
Path(arguments.steps).write_text("")
outcome = {"run": spec["id"], "digest": "", "outcome": "ok", "reason": None, "learning_rate": said["learning_rate"]}
Path(arguments.outcome).write_text(json.dumps(outcome))
