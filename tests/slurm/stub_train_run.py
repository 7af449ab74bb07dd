"""Stands in for train_run.py where only scheduling is looked at: says where it ran, and ends as it is told.

behaviour.json: method name -> {"sleep": seconds, "fails_first": whether all but the last attempt fail}.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

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
    "configuration": os.environ.get("SLURM_CONF"),
    "attempts_left": arguments.attempts_left,
    "rank": spec["method"].get("rank"),
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
outcome = {"run": spec["id"], "digest": "", "outcome": "ok", "reason": None}
Path(arguments.outcome).write_text(json.dumps(outcome))
