"""From experiments to runs: every combination that a study asks for, each value with the place it came from."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunemap.config import (
    BASE_METHOD,
    CHOICES,
    EVALUATION_FACTORS,
    POINT_KEYS,
    AdapterMethod,
    BaseMethod,
    DatasetConfig,
    Experiment,
    Factors,
    GoraMethod,
    Method,
    PeftMethod,
    Study,
    TinyModel,
    given,
)
from tunemap.data.prompts import check_template
from tunemap.errors import UserError, unknown_key
from tunemap.flaws import LETS_THROUGH, Flaw, experiment_flaws, run_flaws
from tunemap.methods.dtypes import dtype_reason
from tunemap.methods.sharding import UNSHARDABLE
from tunemap.run import TASK_KINDS, Run

MADE_TASKS = ("arithmetic", "sst2")  # tasks whose data can be made here
SHARED_FOLDER = "shared"  # results/shared holds models, datasets and tokens
NO_ROOFLINE = "roofline: needs a profile (auto, nsys or torch) and at least one point on one GPU"
LONGEST_ID = 200  # file names end at 255 bytes; suffixes and temporary names need the rest


@dataclass(frozen=True)
class PlannedExperiment:
    """An experiment with the ids of its runs, in the order of its grid."""

    name: str
    question: str
    vary: tuple[str, ...]
    runs: tuple[str, ...]
    base_runs: tuple[str, ...]
    captures: tuple[str, ...]  # runs that are repeated under a profiler
    profile: str  # which one
    inferences: tuple[str, ...] = ()  # runs whose inference is measured
    rooflines: tuple[str, ...] = ()  # captured runs whose kernels are measured one by one
    flaws: tuple[Flaw, ...] = ()  # known flaws that it repeats, all of them accepted


@dataclass(frozen=True)
class Plan:
    """All runs of a study, what each experiment uses of them, and where each value came from."""

    study: Study
    experiments: tuple[PlannedExperiment, ...]
    runs: dict[str, Run]
    provenance: dict[str, dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; contains everything that tables, figures and the report need of the study."""
        study = self.study.model_dump(mode="json")
        return {
            "study": study["study"],
            "data_root": study["data_root"],
            "report": study["report"],
            "hardware": study["hardware"],
            "prompt_templates": study["prompt_templates"],
            "experiments": [
                {
                    "name": experiment.name,
                    "question": experiment.question,
                    "vary": list(experiment.vary),
                    "runs": list(experiment.runs),
                    "base_runs": list(experiment.base_runs),
                    "captures": list(experiment.captures),
                    "profile": experiment.profile,
                    "inferences": list(experiment.inferences),
                    "rooflines": list(experiment.rooflines),
                    "flaws": [{"flaw": flaw.id, "what": flaw.what} for flaw in experiment.flaws],
                }
                for experiment in self.experiments
            ],
            "runs": {
                name: run.evaluation_spec()
                | {
                    "digest": run.training_digest,
                    "evaluation_digest": run.evaluation_digest,
                    "provenance": self.provenance[name],
                }
                for name, run in self.runs.items()
            },
        }


@dataclass(frozen=True)
class Point:
    """A combination of an experiment before its run is built."""

    values: dict[str, Any]  # factors, choices and `method.*` parameters
    provenance: dict[str, str]


def plan_study(study: Study) -> tuple[Plan, list[str]]:
    """Expand all experiments; returns the plan and every problem found (an empty list: the study can run)."""
    runs: dict[str, Run] = {}
    provenance: dict[str, dict[str, str]] = {}
    experiments: list[PlannedExperiment] = []
    problems: list[str] = _wrong_names(study)
    for experiment in study.experiments:
        if not _names_exist(study, experiment):
            continue
        planned, found = _expand(study, experiment)
        problems += found
        base: list[Run] = []
        for run, origin in planned:
            if runs.setdefault(run.id, run) != run:
                problems.append(_same_id(experiment, run))
            provenance.setdefault(run.id, origin)
            base.append(_base_run(study, run))
        flaws = _flaws(experiment, [run for run, _ in planned])
        problems += _unaccepted(study, experiment, flaws)
        for run in base:
            if runs.setdefault(run.id, run) != run:
                problems.append(_same_id(experiment, run))
            provenance.setdefault(run.id, {"method": "added: the row without fine-tuning"})
        rooflines = _rooflines(experiment, [run for run, _ in planned])
        if experiment.roofline and not rooflines:
            problems.append(f"experiment {experiment.name}: {NO_ROOFLINE}")
        experiments.append(
            PlannedExperiment(
                name=experiment.name,
                question=experiment.question,
                vary=tuple(given(experiment.vary)),
                runs=tuple(dict.fromkeys(run.id for run, _ in planned)),
                base_runs=tuple(dict.fromkeys(run.id for run in base)),
                captures=tuple(
                    dict.fromkeys(run.id for run, _ in planned if run.factors.seed == experiment.seeds[0])
                    if experiment.profile != "none"
                    else ()
                ),
                profile=experiment.profile,
                inferences=tuple(
                    dict.fromkeys(run.id for run, _ in planned if run.factors.seed == experiment.seeds[0])
                    if experiment.inference
                    else ()
                ),
                rooflines=rooflines,
                flaws=tuple(flaws),
            )
        )
    return Plan(study, tuple(experiments), runs, provenance), [*problems, *_needed_flaws(study, experiments)]


def _rooflines(experiment: Experiment, runs: list[Run]) -> tuple[str, ...]:
    """Runs whose kernels Nsight Compute measures: captured ones on one GPU, since it cannot replay what ranks share."""
    if not experiment.roofline or experiment.profile == "none":
        return ()
    first = experiment.seeds[0]
    return tuple(dict.fromkeys(run.id for run in runs if run.factors.seed == first and run.factors.gpus == 1))


def _flaws(experiment: Experiment, runs: list[Run]) -> list[Flaw]:
    """Known flaws that an experiment would repeat, each once."""
    single = [flaw for run in runs for flaw in run_flaws(run)]
    return list(dict.fromkeys([*single, *experiment_flaws(runs, list(given(experiment.vary)))]))


def _unaccepted(study: Study, experiment: Experiment, flaws: list[Flaw]) -> list[str]:
    return [f"experiment {experiment.name}: {flaw}" for flaw in flaws if flaw.id not in study.accept_flaws]


def _needed_flaws(study: Study, experiments: list[PlannedExperiment]) -> list[str]:
    """The whole list that a study needs, where it needs more than it accepts."""
    needed = sorted({flaw.id for experiment in experiments for flaw in experiment.flaws})
    if set(needed) <= set(study.accept_flaws):
        return []
    return [f"accept_flaws: the study runs as it is with [{', '.join(sorted({*needed, *study.accept_flaws}))}]"]


def _same_id(experiment: Experiment, run: Run) -> str:
    return (
        f"experiment {experiment.name}: two different runs would be called {run.id}; "
        "rename the model, dataset or method of one"
    )


def _named(study: Study, experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """Each model, dataset and method that an experiment names, as (place, choice, name)."""
    for place, values in (("defaults", study.defaults), ("fixed", experiment.fixed), ("vary", experiment.vary)):
        for choice, names in given(values).items():
            if choice in CHOICES:
                for name in names if isinstance(names, list) else [names]:
                    yield place, choice, name


def _declared(study: Study, choice: str) -> dict[str, Any]:
    declared: dict[str, dict[str, Any]] = {
        "model": dict(study.models),
        "dataset": dict(study.datasets),
        "method": dict(study.methods),
    }
    return declared[choice]


def _names_exist(study: Study, experiment: Experiment) -> bool:
    names_known = all(name in _declared(study, choice) for _, choice, name in _named(study, experiment))
    templates = [dataset.prompt_template for dataset in study.datasets.values()]
    return names_known and all(template is None or template in study.prompt_templates for template in templates)


def _wrong_names(study: Study) -> list[str]:
    """Names that are used and not declared, or declared twice, or reserved."""
    problems = []
    if study.study == SHARED_FOLDER:
        problems.append(f"study: the name '{SHARED_FOLDER}' is reserved for what studies share; choose another")
    for experiment in study.experiments:
        for place, choice, name in _named(study, experiment):
            known = _declared(study, choice)
            if name not in known:
                where = place if place == "defaults" else f"experiment {experiment.name}: {place}"
                problems.append(f"{where}: unknown {choice} '{name}'; declared: {', '.join(known)}")
    for dataset_name, dataset in study.datasets.items():
        template = dataset.prompt_template
        if template is not None and template not in study.prompt_templates:
            templates = ", ".join(study.prompt_templates) or "none"
            problems.append(f"datasets.{dataset_name}: unknown prompt_template '{template}'; declared: {templates}")
        problems += [f"datasets.{dataset_name}: {reason}" for reason in _dataset_problems(dataset)]
    for template_name, text in study.prompt_templates.items():
        try:
            check_template(text, f"prompt_templates.{template_name}")
        except UserError as error:
            problems.append(str(error))
    if BASE_METHOD in study.methods:
        problems.append(f"methods.{BASE_METHOD}: the name is reserved for the row without fine-tuning; choose another")
    baseline = study.report.baseline_method
    if baseline is not None and baseline not in study.methods:
        problems.append(f"report.baseline_method: unknown method '{baseline}'; declared: {', '.join(study.methods)}")
    names = [experiment.name for experiment in study.experiments]
    for repeated in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"experiments: the name '{repeated}' is used {names.count(repeated)} times; names are unique")
    return list(dict.fromkeys(problems))


def _dataset_problems(dataset: DatasetConfig) -> Iterator[str]:
    """Keys of a dataset that do not go together, or that are missing for its source or task."""
    if dataset.source == "made" and dataset.task not in MADE_TASKS:
        yield f"source made knows the tasks {', '.join(MADE_TASKS)}, not {dataset.task}; use hub, local or file"
    needed = {"hub": ("id",), "local": ("path",), "file": ("train_file", "test_file"), "made": ()}[dataset.source]
    if dataset.task in ("generation", "classification"):
        needed = (*needed, "prompt_field", "answer_field")
    for key in needed:
        if getattr(dataset, key) is None:
            yield f"task {dataset.task} with source {dataset.source} needs the key '{key}'"
    if dataset.prompt_template is not None and dataset.system_prompt is not None:
        yield "prompt_template is the whole prompt; write system_prompt into it, or leave one of them out"
    if TASK_KINDS[dataset.task] == "classification" and (dataset.prompt_template or dataset.system_prompt):
        yield "a text to classify is taken as it is; leave prompt_template and system_prompt out"


def _expand(study: Study, experiment: Experiment) -> tuple[list[tuple[Run, dict[str, str]]], list[str]]:
    """The runs of one experiment with provenance, and its problems (each names the experiment)."""
    where = f"experiment {experiment.name}"
    problems: list[str] = []
    fixed, vary = given(experiment.fixed), given(experiment.vary)
    for key in sorted(set(fixed) & set(vary)):
        problems.append(f"{where}: '{key}' is both in fixed and in vary; keep one")
    for key, values in vary.items():
        if len({repr(value) for value in values}) < len(values):
            problems.append(f"{where}: vary.{key} holds a value twice: {values}")
    if len(set(experiment.seeds)) < len(experiment.seeds):
        problems.append(f"{where}: seeds holds a seed twice: {experiment.seeds}; a repetition needs a seed of its own")
    points = list(_points(study, experiment))
    for choice in CHOICES:
        if any(choice not in point.values for point in points):
            problems.append(f"{where}: no {choice} given; set it in defaults, fixed or vary")
    for key in [key for key in [*fixed, *vary] if key.startswith("method.")]:
        if not any(key in point.values for point in points):
            methods = ", ".join(
                dict.fromkeys(str(point.values["method"]) for point in points if "method" in point.values)
            )
            problems.append(
                f"{where}: none of its methods ({methods}) has the parameter '{key.removeprefix('method.')}'"
            )
    if problems:
        return [], problems
    kept = [point for point in points if _wanted(point, experiment)]
    for rule, matches in (("exclude", experiment.exclude), ("only", experiment.only)):
        for match in matches:
            unknown = [key for key in match if key not in POINT_KEYS]
            if unknown:
                problems += [f"{where}: {rule}: {unknown_key(key, POINT_KEYS)}" for key in unknown]
            elif not any(_matches(point, match) for point in points):
                problems.append(f"{where}: {rule} {match} matches no point of the grid")
    if not kept and not problems:
        problems.append(f"{where}: exclude and only leave no run")
    planned = []
    for point in kept:
        run = _build(study, point)
        reasons = reasons_against(run)
        problems += [f"{where}: {_varied(point, experiment)}: {reason}" for reason in reasons]
        planned.append((run, point.provenance))
    return planned, list(dict.fromkeys(problems))


def _points(study: Study, experiment: Experiment) -> Iterator[Point]:
    defaults, fixed, vary = given(study.defaults), given(experiment.fixed), given(experiment.vary)
    for combination in itertools.product(*vary.values()):
        varied = dict(zip(vary, combination, strict=True))
        method_name = (defaults | fixed | varied).get("method")
        method = study.methods.get(method_name) if isinstance(method_name, str) else None
        layers = [
            ("built-in default", Factors().model_dump()),
            ("methods", _parameters(method) if method else {}),
            ("defaults", defaults),
            (f"method {method_name}", given(method.factors) if method else {}),
            ("fixed", fixed),
            ("vary", varied),
        ]
        for seed in experiment.seeds:
            values: dict[str, Any] = {}
            provenance: dict[str, str] = {}
            for origin, layer in [*layers, ("seeds", {"seed": seed})]:
                values |= layer
                provenance |= dict.fromkeys(layer, origin)
            if method is not None:  # a parameter that the method does not have is no factor of this point
                known = _parameters(method)
                for key in [key for key in values if key.startswith("method.") and key not in known]:
                    del values[key], provenance[key]
            yield Point(values, provenance)


def _parameters(method: Method) -> dict[str, Any]:
    """The parameters of a method by the names that experiments have for them."""
    own = [name for name in type(method).model_fields if name not in ("kind", "factors")]
    return {f"method.{name}": getattr(method, name) for name in own}


def _matches(point: Point, match: dict[str, Any]) -> bool:
    return all(
        key in point.values and point.values[key] in (wanted if isinstance(wanted, list) else [wanted])
        for key, wanted in match.items()
    )


def _wanted(point: Point, experiment: Experiment) -> bool:
    if any(_matches(point, match) for match in experiment.exclude):
        return False
    return not experiment.only or any(_matches(point, match) for match in experiment.only)


def _varied(point: Point, experiment: Experiment) -> str:
    keys = [*given(experiment.vary)] or ["method"]
    return ", ".join(f"{key}={point.values.get(key)}" for key in keys)


def _build(study: Study, point: Point) -> Run:
    values = point.values
    definition = study.methods[values["method"]]
    parameters = {key.removeprefix("method."): value for key, value in values.items() if key.startswith("method.")}
    method = type(definition).model_validate(definition.model_dump(exclude={"factors"}) | parameters)
    dataset = study.datasets[values["dataset"]]
    template = study.prompt_templates[dataset.prompt_template] if dataset.prompt_template else None
    run = Run(
        id="",
        model_name=values["model"],
        model=study.models[values["model"]],
        dataset_name=values["dataset"],
        dataset=dataset.model_copy(update={"prompt_template": None}),  # a template that is renamed changes no run
        method_name=values["method"],
        method=method,
        prompt_template=template,
        factors=Factors(**{name: values[name] for name in Factors.model_fields}),
    )
    accepted = {flaw.id for flaw in run_flaws(run)} & set(study.accept_flaws) & set(LETS_THROUGH)
    return run.model_copy(update={"id": _run_id(study, run, definition), "accept_flaws": tuple(sorted(accepted))})


def _run_id(study: Study, run: Run, definition: Method) -> str:
    """Names of model, dataset and method, then each value that this run has and the study's defaults do not."""
    usual = Factors().model_dump() | given(study.defaults) | given(definition.factors)
    parts = [run.model_name, run.dataset_name, run.method_name]
    for name in type(definition).model_fields:
        if name == "factors":
            continue
        value = getattr(run.method, name)
        if value != getattr(definition, name):
            parts.append(f"{name}-{_readable(value)}")
    for name, value in run.factors.model_dump().items():
        if name != "seed" and value != usual[name]:
            parts.append(f"{name}-{_readable(value)}")
    return _as_id([*parts, f"seed-{run.factors.seed}"], run)


def _as_id(parts: list[str], run: Run) -> str:
    """The parts joined; with a digest where they are too long or hold signs that no file name should."""
    readable = ".".join(parts)
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", readable)
    return readable if plain == readable[:LONGEST_ID] else f"{plain[: LONGEST_ID - 17]}-{run.evaluation_digest}"


def _readable(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "+".join(map(_readable, value))
    return str(value).lower() if isinstance(value, bool) or value is None else f"{value}"


def _base_run(study: Study, run: Run) -> Run:
    """The row without fine-tuning that belongs to `run`: same model, data, precision and evaluation."""
    kept = ("max_length", "precision", "attention", "threads_per_process", *EVALUATION_FACTORS)
    factors = Factors(**{name: getattr(run.factors, name) for name in kept})
    base = run.model_copy(
        update={
            "id": "",
            "method_name": BASE_METHOD,
            "method": BaseMethod(kind="base"),
            "factors": factors,
            "accept_flaws": (),
        }
    )
    usual = Factors().model_dump() | given(study.defaults)
    differing = [
        f"{name}-{_readable(getattr(factors, name))}"
        for name in Factors.model_fields
        if name in kept and getattr(factors, name) != usual[name]
    ]
    parts = [run.model_name, run.dataset_name, BASE_METHOD, *differing]
    return base.model_copy(update={"id": _as_id(parts, base)})


def reasons_against(run: Run) -> list[str]:
    """Why a combination cannot run or would not mean what it says; empty where nothing stands against it."""
    factors, reasons = run.factors, []
    if factors.strategy == "single" and factors.gpus != 1:
        reasons.append(f"strategy single uses one device, gpus is {factors.gpus}; use ddp, fsdp or hybrid")
    if factors.gpus % factors.nodes:
        reasons.append(f"gpus {factors.gpus} cannot be spread evenly over nodes {factors.nodes}; use a multiple")
    if factors.strategy == "hybrid" and factors.gpus != 1 and (factors.gpus < 4 or factors.gpus % 2):
        reasons.append(f"strategy hybrid needs an even number of at least 4 devices, gpus is {factors.gpus}")
    if not factors.reshard_after_forward and factors.strategy not in ("fsdp", "hybrid"):
        reasons.append(
            f"reshard_after_forward false keeps gathered weights, and strategy {factors.strategy} gathers none; "
            "use fsdp or hybrid, or leave it true"
        )
    if factors.fsdp_unit != "block" and factors.strategy not in ("fsdp", "hybrid"):
        reasons.append(f"fsdp_unit {factors.fsdp_unit} is about sharding, strategy {factors.strategy} shards nothing")
    if factors.extraction == "hpml" and run.dataset.task not in ("gsm8k", "arithmetic"):
        reasons.append(f"extraction hpml reads numbers, task {run.dataset.task} has none")
    if factors.max_steps is None and factors.epochs is None:
        reasons.append("max_steps and epochs are both null; one of them must end the training")
    if factors.max_steps is not None and factors.warmup_steps >= factors.max_steps:
        reasons.append(f"warmup_steps {factors.warmup_steps} leaves nothing of max_steps {factors.max_steps}")
    if factors.max_steps is not None and factors.measurement_warmup_steps >= factors.max_steps:
        reasons.append(
            f"measurement_warmup_steps {factors.measurement_warmup_steps} leaves no step of max_steps "
            f"{factors.max_steps} to measure"
        )
    if factors.attention == "flash_attention_2" and factors.precision == "fp32":
        reasons.append("flash_attention_2 has no fp32 kernels; use precision bf16, fp16 or pure_bf16")
    if run.task_kind == "classification" and factors.batching == "packed":
        reasons.append("packed rows hold several examples, a classifier gives one answer per row")
    if run.task_kind == "classification" and factors.logits == "label_tokens":
        reasons.append("a classifier has logits of its classes alone; use logits all")
    if isinstance(run.model, TinyModel):
        wanted = "classification" if run.model.architecture == "distilbert" else "generation"
        if run.task_kind != wanted:
            reasons.append(f"the tiny {run.model.architecture} is made for {wanted}, {run.dataset.task} is not")
    if isinstance(run.method, AdapterMethod) and factors.precision == "fp16" and run.method.adapter_dtype == "float16":
        reasons.append("the gradient scaler of fp16 needs adapter_dtype float32")
    if isinstance(run.method, AdapterMethod) and factors.precision == "fp32" and run.method.adapter_dtype != "float32":
        reasons.append(f"precision fp32 with adapter_dtype {run.method.adapter_dtype} is not fp32")
    return [*reasons, *_method_reasons(run)]


FRUGAL = ("galore_adamw", "lomo", "adalomo")
IN_BACKWARD = ("lomo", "adalomo")
VIRTUAL_TOKENS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE")  # peft drops position ids for them


def _method_reasons(run: Run) -> Iterator[str]:
    """What stands against a method of the GoRA ladder, of peft, or against an optimizer, under these factors."""
    factors, method = run.factors, run.method
    sharded = factors.strategy in ("fsdp", "hybrid")
    if isinstance(method, GoraMethod) and factors.precision == "fp16":
        yield "gora estimates gradients without a scaler, which fp16 is too narrow for; use bf16 or fp32"
    if isinstance(method, GoraMethod) and method.estimation_batches < factors.gpus:
        yield f"estimation_batches {method.estimation_batches} leaves one of {factors.gpus} devices without a batch"
    if isinstance(method, PeftMethod) and sharded and method.type in UNSHARDABLE:
        yield f"{method.type} cannot be sharded by {factors.strategy}: {UNSHARDABLE[method.type]}; use single or ddp"
    if isinstance(method, PeftMethod) and (
        reason := dtype_reason(method.type, method.adapter_dtype, factors.precision)
    ):
        yield reason
    if isinstance(method, PeftMethod) and method.type in VIRTUAL_TOKENS and factors.batching == "packed":
        yield f"{method.type} puts virtual tokens before each row, which holds several examples if packed"
    yield from _optimizer_reasons(run)


WHOLE_MATRICES = ("adafactor", "galore_adamw")  # optimizers that look at whole rows, columns or matrices


def _optimizer_reasons(run: Run) -> Iterator[str]:
    """What stands against an optimizer."""
    factors, name = run.factors, run.factors.optimizer
    if name in WHOLE_MATRICES and factors.strategy in ("fsdp", "hybrid"):
        yield f"{name} looks at whole rows and columns, of which {factors.strategy} leaves each device a part"
    if name in FRUGAL and run.method.kind != "full":
        yield f"{name} saves states of whole weights, and kind {run.method.kind} trains few; use it with kind full"
    if name not in IN_BACKWARD:
        return
    because = f"{name} changes each weight during the backward pass"
    if factors.strategy != "single":
        yield f"{because}, before other devices' gradients are there; use strategy single"
    if factors.gradient_accumulation > 1:
        yield f"{because}, so that there is nothing to accumulate; use gradient_accumulation 1"
    if factors.max_grad_norm is not None:
        yield f"{because}, before the norm of all gradients is known; use max_grad_norm null"
    if factors.precision == "fp16":
        yield f"{because}, before fp16's gradient scaler has looked at it; use bf16, pure_bf16 or fp32"
