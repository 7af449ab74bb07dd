# Loads and freezes the plan; answers one question about it per function. No rules here.
import json
import os
import shlex
import sys
from functools import cache
from pathlib import Path

CHECKOUT = Path(workflow.basedir)
if CHECKOUT.name == "workflow":
    CHECKOUT = CHECKOUT.parent
sys.path.insert(0, str(CHECKOUT / "src"))

from tunemap import requests, slurm
from tunemap import sources as source_files
from tunemap.duplicates import what_is_left
from tunemap.errors import UserError
from tunemap.frozen import FrozenPlan, freeze, thaw
from tunemap.study_file import load_plan
from tunemap.training.devices import device_kind

RETRIES = (
    "TUNEMAP_RETRIES"  # --retries of the main process; inside of jobs it is always 0
)


wildcard_constraints:
    study=r"[A-Za-z0-9_.-]+",
    run=r"[A-Za-z0-9_.+-]+",
    model=r"[A-Za-z0-9_.-]+",
    dataset=r"[A-Za-z0-9_.-]+",
    tokens=r"[A-Za-z0-9_.-]+",


# Jobs find the package beside the Snakefile, in every environment; the end is Snakemake's own default.
PACKAGE = shlex.quote(f"{CHECKOUT}/src")
shell.prefix(
    f"export PYTHONPATH={PACKAGE}${{{{PYTHONPATH:+:$PYTHONPATH}}}}; set -euo pipefail; "
)


# A study given with --configfile replaces the default study; Snakemake itself would merge the two.
STUDY_FILE = Path(
    [
        CHECKOUT / "config" / "config.yaml",
        *(workflow.config_settings.configfiles or []),
    ][-1]
)


def _plan() -> FrozenPlan:
    """The plan of this workflow. Spawned jobs take the plan of the workflow that spawned them, not today's file."""
    frozen = thaw(os.environ)
    if frozen is not None:
        return frozen
    given = workflow.config_settings.config or {}
    if unknown := sorted(set(given) - {"data_root", "scale"}):
        raise UserError(
            f"--config {unknown[0]}: only data_root and scale can be given there; edit the study file instead"
        )
    plan = load_plan(STUDY_FILE, **given)
    return freeze(plan, Path(".snakemake") / "tunemap", os.environ)


try:
    PLAN = _plan()
except UserError as error:
    raise WorkflowError(str(error)) from None


def _tell_jobs():
    """What jobs shall find in their environment, which is this process's (sbatch --export=ALL)."""
    slurm.keep_configuration(os.environ, Path(".snakemake") / "tunemap" / "bin")
    # Before its time limit, a job is told to write a checkpoint. Nobody but the launcher of a run heeds SIGURG.
    os.environ.setdefault("SBATCH_SIGNAL", f"URG@{requests.STEP_DOWN_S}")
    os.environ[RETRIES] = str(workflow.execution_settings.retries)


# In the main process alone, before anything is submitted.
onstart:
    if left := what_is_left(Path("results"), PLAN):
        raise WorkflowError(left)
    _tell_jobs()


def stage_script(stage):
    """The script of a stage."""
    return os.path.relpath(CHECKOUT / "workflow" / "scripts" / f"{stage}.py")


def source_digest(stage):
    """Changes with the source files that a stage uses; as inputs, ninety files a job would slow each choice of jobs."""
    script = CHECKOUT / "workflow" / "scripts" / f"{stage}.py"
    return source_files.planned_digest(script, os.environ)


def study_results(wildcards):
    """What a study comes to, and what it is made of: Snakemake makes no file that is gone and that nobody asks for."""
    return [
        f"results/{PLAN.study}/report.html",
        f"results/{PLAN.study}/study.sqlite",
        f"results/{PLAN.study}/tables/runs.csv",
        *outcomes(wildcards),
        *evaluations(wildcards),
        *facts(wildcards),
        *inferences(wildcards),
    ]


def artifact_file(wildcards):
    return f"results/{PLAN.study}/artifact.tar.gz"


def data_root(wildcards):
    return PLAN.data_root


def model_spec(wildcards):
    return PLAN.model_spec(wildcards.model)


def model_sources(wildcards):
    return PLAN.model_sources(wildcards.model)


def dataset_spec(wildcards):
    return PLAN.dataset_spec(wildcards.dataset)


def dataset_sources(wildcards):
    return PLAN.dataset_sources(wildcards.dataset)


def tokens_spec(wildcards):
    return PLAN.tokens_spec(wildcards.tokens)


def tokens_model(wildcards):
    return f"results/shared/models/{PLAN.tokens_run(wildcards.tokens).model_key}"


def tokens_dataset(wildcards):
    return f"results/shared/datasets/{PLAN.tokens_run(wildcards.tokens).dataset_key}"


def run_model(wildcards):
    return f"results/shared/models/{PLAN.runs[wildcards.run].model_key}"


def run_dataset(wildcards):
    return f"results/shared/datasets/{PLAN.runs[wildcards.run].dataset_key}"


def run_tokens(wildcards):
    return f"results/shared/tokens/{PLAN.runs[wildcards.run].tokens_key}"


def trained_models(wildcards):
    return sorted(
        {
            f"results/shared/models/{run.model_key}"
            for run in PLAN.runs.values()
            if not run.is_base
        }
    )


def trained_tokens(wildcards):
    return sorted(
        {
            f"results/shared/tokens/{run.tokens_key}"
            for run in PLAN.runs.values()
            if not run.is_base
        }
    )


def training_spec(wildcards):
    """Canonical JSON of everything that training depends on."""
    return PLAN.training_spec(wildcards.run)


def evaluation_spec(wildcards):
    """Canonical JSON of everything that evaluation depends on."""
    return PLAN.evaluation_spec(wildcards.run)


def jobs_stay_here():
    """Whether this machine runs the jobs. Dry runs count as local; one for a cluster has a number of jobs."""
    of_cluster = workflow.dryrun and workflow.resource_settings.nodes is not None
    return workflow.local_exec and not of_cluster


@cache
def this_machines_device():
    """What `auto` is here; asked once, since each question starts the driver's library anew."""
    return device_kind("auto")


def scheduled_device():
    """What jobs run on. Where they stay on this machine, `auto` is what it has; of others nobody knows yet."""
    if PLAN.device == "auto" and jobs_stay_here():
        return this_machines_device()
    return PLAN.device


def timed_threads(threads):
    """Cores of what is timed and needs so many: on this machine's CPU all, since what ran beside it would slow it."""
    return (
        workflow.cores if jobs_stay_here() and scheduled_device() == "cpu" else threads
    )


def run_threads(wildcards):
    """Cores of one node."""
    run = PLAN.runs[wildcards.run]
    return timed_threads(requests.node_cpus(run, device=scheduled_device()))


def inference_threads(wildcards):
    """Inference is timed too, by as many processes as an evaluation has."""
    return timed_threads(evaluation_threads(wildcards))


def model_bytes(wildcards):
    return requests.prepared_bytes(Path(run_model(wildcards)))


def run_mem_mb(wildcards, attempt):
    """Host memory of one node."""
    return requests.training_memory_mb(
        PLAN.runs[wildcards.run],
        device=scheduled_device(),
        model_bytes=model_bytes(wildcards),
        predicted=PLAN.prediction(wildcards.run),
        attempt=attempt,
    )


def run_runtime(wildcards, attempt):
    return requests.training_minutes(
        PLAN.runs[wildcards.run],
        predicted=PLAN.prediction(wildcards.run),
        attempt=attempt,
    )


def evaluation_mem_mb(wildcards, attempt):
    return requests.evaluation_memory_mb(
        PLAN.runs[wildcards.run],
        model_bytes=model_bytes(wildcards),
        attempt=attempt,
    )


def evaluation_runtime(wildcards, attempt):
    return requests.evaluation_minutes(
        PLAN.runs[wildcards.run],
        device=scheduled_device(),
        model_bytes=model_bytes(wildcards),
        attempt=attempt,
    )


def inference_runtime(wildcards, attempt):
    return requests.inference_minutes(attempt=attempt)


def attempts_left(wildcards, attempt):
    """How often a job is submitted again if this attempt fails."""
    retries = os.environ.get(RETRIES, workflow.execution_settings.retries)
    return max(0, int(retries) + 1 - attempt)


def run_nodes(wildcards):
    return PLAN.runs[wildcards.run].factors.nodes


def run_tasks(wildcards):
    """One torchrun per node; none is asked for on a single node, where the plugin would start one per GPU."""
    return run_nodes(wildcards) if run_nodes(wildcards) > 1 else None


def run_launched_by(wildcards):
    """`srun` tells the plugin that the job starts its steps on other nodes itself."""
    return "srun" if run_nodes(wildcards) > 1 else None


def run_gres(wildcards):
    """GPUs per node of a run over several; `gpu` alone would let Slurm spread them unevenly."""
    if run_nodes(wildcards) == 1 or run_all_gpus(wildcards) == 0:
        return None
    return f"gpu:{run_all_gpus(wildcards) // run_nodes(wildcards)}"


def evaluation_threads(wildcards):
    """An evaluation has as many processes as the training had on a node; they share its batches."""
    factors = PLAN.runs[wildcards.run].factors
    return factors.gpus // factors.nodes * factors.threads_per_process


def run_gpus(wildcards):
    """GPUs of a run on one node; see `run_gres`."""
    return run_all_gpus(wildcards) if run_nodes(wildcards) == 1 else None


def run_all_gpus(wildcards):
    return (
        0
        if scheduled_device() == "cpu" or PLAN.runs[wildcards.run].is_base
        else PLAN.runs[wildcards.run].factors.gpus
    )


def evaluation_gpus(wildcards):
    factors = PLAN.runs[wildcards.run].factors
    return 0 if scheduled_device() == "cpu" else factors.gpus // factors.nodes


def device(wildcards):
    """`hardware.device` of the study; a job finds out itself what `auto` is where it runs."""
    return PLAN.device


def outcomes(wildcards):
    return [f"results/{PLAN.study}/runs/{run}/outcome.json" for run in PLAN.runs]


def steps(wildcards):
    return [f"results/{PLAN.study}/runs/{run}/steps.csv" for run in PLAN.runs]


def evaluations(wildcards):
    return [
        f"results/{PLAN.study}/evaluations/{run}/evaluation.json" for run in PLAN.runs
    ]


def capture_backend(wildcards):
    """The profiler that the first experiment with this capture asks for."""
    return PLAN.captures[wildcards.run]


def roofline_capture(wildcards):
    """The capture of single kernels that belongs to a run's facts, where an experiment asks for it."""
    if wildcards.run not in PLAN.rooflines:
        return []
    return f"results/{PLAN.study}/rooflines/{wildcards.run}"


def roofline_option(wildcards, input):
    return ["--roofline", input.roofline] if input.roofline else []


def facts(wildcards):
    return [f"results/{PLAN.study}/facts/{run}" for run in PLAN.captures]


def inferences(wildcards):
    return [f"results/{PLAN.study}/inference/{run}.json" for run in PLAN.inferences]


def hardware_descriptions(wildcards):
    return [
        os.path.relpath(file)
        for file in sorted((CHECKOUT / "resources" / "hardware").glob("*.yaml"))
    ]


def published_numbers(wildcards):
    """The numbers that results are compared with, where the study repeats a published one."""
    file = CHECKOUT / "resources" / "published" / "numbers.csv"
    return [os.path.relpath(file)] if PLAN.values["report"]["published"] else []


def tables_plan(wildcards):
    """The plan without the wording of the report: a new title does not make new tables."""
    return PLAN.tables_file


def report_plan(wildcards):
    return PLAN.report_file


def study_file(wildcards):
    """The file that was given, for the commands which the report prints."""
    given = workflow.config_settings.configfiles or ["config/config.yaml"]
    return os.path.relpath(given[-1])
