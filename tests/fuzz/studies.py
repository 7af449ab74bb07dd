"""Mutated study files: odd values anywhere, edits of the text, and nonsense that must be refused."""

import copy
import datetime
import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from tunemap.run import Run, canonical_json
from tunemap.study_file import load_plan

from .judge import FaultError, Verdict, judge

ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**63), 2**70, 1.5, 1e-300, 1e300, 5e-324, -0.0, float("nan"),
    float("inf"), "", " ", "x", "1e-4", "0x10", "1_000", "12:30:00", "yes", "null", "\x00", "~nouser/x", "$NOPE",
    "a" * 300, "\ud800", "../../x", "/", "a\nb", "{prompt}", "{prompt}{prompt}", "Ω", "$(id)", "`id`", "';id;",
    [], [1], [[1]], [1, 1], [True, 1], [1, 1.0], {}, {"a": 1}, {1: 2}, {None: 1}, datetime.date(2020, 1, 1), b"x",
    "lora", "full", "tiny", "tiny-qwen2", [None], [{}], {"method.rank": 3}, {"source": "tiny"}, {"kind": "lora"},
    {"x": [1, {"y": {}}]}, {1, 2}, {"method": ["full", "lora"]}, {"seed": 0}, ["lora", "lora"],
]  # fmt: skip
ODD_KEYS: list[Any] = [
    "x", None, 1, True, 1.5, datetime.date(2020, 1, 1), "", (1, 2), "method", "method.rank", b"k", "<<", "[key]",
    "seed", "factors", "kind", "source", "learning_rate", "..", "a/b", "a b", "-a", "shared", "base", "\x00",
]  # fmt: skip
SIGNS = [*"{}[]:,&*!|>'\"%@`-?#~\n\t ", "<<: ", "*a", "&a ", "!!python/object/apply:os.system ", "!!int ", "---\n"]
POSITIVE = ("max_length", "per_device_batch_size", "learning_rate", "max_steps", "train_rows", "rank")


def bases(repository: Path, folder: Path) -> list[dict[str, Any]]:
    """The studies that are mutated: those of the repository, whose data need not be there, and one with every section.

    Makes the few files in `folder` that the last one names.
    """
    (folder / "t").mkdir(exist_ok=True)
    (folder / "c.json").write_text("{}")
    (folder / "a.jsonl").write_text("{}")
    paths = [repository / "config" / "config.yaml", *sorted((repository / "config" / "studies").glob("*.yaml"))]
    studies = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]
    full = copy.deepcopy(studies[0])
    full["data_root"] = str(folder)
    full["models"] |= {
        "random": {"source": "random", "config": "c.json", "tokenizer": "t", "overrides": {"layers": 2}},
        "local": {"source": "local", "path": "t"},
        "hub": {"source": "hub", "id": "a/b"},
    }
    files = {"train_file": "a.jsonl", "test_file": "a.jsonl", "prompt_field": "p", "answer_field": "a"}
    full["datasets"]["own"] = {"task": "generation", "source": "file", "prompt_template": "t"} | files
    full["prompt_templates"] = {"t": "Q: {prompt}"}
    full["methods"] |= {"dora": {"kind": "peft", "type": "DORA", "parameters": {"r": 4}}, "gora": {"kind": "gora"}}
    full["hardware"] = {"device": "cpu"}
    full["experiments"][0] |= {"exclude": [{"method": "full"}], "only": [{"method": ["lora", "qlora"]}]}
    return [study for study in [full, *studies] if _small(study)]


def attempt(seed: int, studies: list[dict[str, Any]], folder: Path) -> Verdict:
    """Write one mutated study file, plan it, and judge what happened."""
    rng = random.Random(seed)
    study, nonsense = copy.deepcopy(rng.choice(studies)), None
    how = rng.random()
    if how < 0.25:
        nonsense = make_nonsense(study, rng)
        text = yaml.safe_dump(study, sort_keys=False)
    elif how < 0.65:
        for _ in range(rng.randint(1, 4)):
            mutate(study, rng)
        text = yaml.safe_dump(study, sort_keys=False)
    else:
        text = edited(yaml.safe_dump(study, sort_keys=False, default_flow_style=rng.random() < 0.3), rng)
    path = folder / "study.yaml"
    data = text.encode("utf-8", "replace" if rng.random() < 0.8 else "surrogatepass")
    path.write_bytes(data)
    return judge(lambda: _plan(path), path, nonsense=nonsense)


def _plan(path: Path) -> None:
    """Plan a file; what is accepted must make sense."""
    plan = load_plan(path)
    values = plan.to_dict()
    json.dumps(values, allow_nan=False)
    if not plan.runs:
        raise FaultError("a plan without runs")
    for name, run in plan.runs.items():
        if Run.from_json(canonical_json(run.evaluation_spec())).evaluation_digest != run.evaluation_digest:
            raise FaultError(f"{name}: its spec does not give it back")
        if name in (".", "..") or "/" in name or len(name) > 200 or not name.isprintable():
            raise FaultError(f"{name!r} is no name of a folder")
        factors = run.factors
        if not (math.isfinite(factors.learning_rate) and factors.learning_rate > 0 and factors.max_length > 0):
            raise FaultError(f"{name}: {factors}")
        if not run.is_base and factors.max_steps is None and factors.epochs is None:
            raise FaultError(f"{name}: never ends")
        if "\x00" in canonical_json(run.evaluation_spec()):
            raise FaultError(f"{name}: a NUL, which no command line can hold")


# --- mutations ----------------------------------------------------------------------------------------------


def mutate(study: dict[Any, Any], rng: random.Random) -> None:
    """Delete, replace, move, rename, add, wrap or repeat one place of a study."""
    candidates = _places(study)[1:]
    if not candidates:
        return
    place = rng.choice(candidates)
    parent, key = _at(study, place[:-1]), place[-1]
    change = rng.choice(["delete", "replace", "replace", "replace", "move", "rename", "add", "wrap", "repeat"])
    if change == "delete":
        del parent[key]
    elif change == "replace":
        parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif change == "move":
        parent[key] = copy.deepcopy(_at(study, rng.choice(candidates)))
    elif change == "rename" and isinstance(parent, dict):
        parent[rng.choice([*ODD_KEYS, f"{key}x"])] = parent.pop(key)
    elif change == "add" and isinstance(parent, dict):
        parent[rng.choice(ODD_KEYS)] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif change == "wrap":
        parent[key] = [parent[key]]
    elif change == "repeat" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))


def edited(text: str, rng: random.Random) -> str:
    """The text with a few pieces cut, put elsewhere, or replaced by signs that mean something in YAML."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 1, 3, 12, 200]))
        sign = rng.choice([*SIGNS, chr(rng.randrange(0x250)), text[end : end + 30]])
        text = text[:start] + sign + text[end:]
    return text


def make_nonsense(study: dict[str, Any], rng: random.Random) -> str:
    """Change a valid study so that it must be refused; returns why."""
    experiment = rng.choice(study["experiments"])
    choice = rng.randrange(12)
    if choice == 0:
        section = rng.choice(["models", "datasets", "methods"])
        name = rng.choice(list(study[section]))
        study[section][name]["learnig_rate"] = 1
        return f"{section}.{name} has an unknown key"
    if choice == 1:
        experiment.setdefault("fixed", {})["per_device_batch_sise"] = 4
        return "a factor is misspelt"
    if choice == 2:
        key = rng.choice(POSITIVE[:4])
        study.setdefault("defaults", {})[key] = rng.choice(
            [0, -1, -(2**40), float("nan"), float("inf"), "8", [8], True]
        )
        return f"defaults.{key} is {study['defaults'][key]!r}"
    if choice == 3:
        experiment["vary"] = {"method": ["nobody"]}
        return "the method does not exist"
    if choice == 4:
        experiment["seeds"] = rng.choice([[], [-1], ["0"], 0, [0.5], [None]])
        return f"seeds are {experiment['seeds']}"
    if choice == 5:
        experiment["name"] = rng.choice(["", "a/b", "..", "a b", "-x", None, 3, "x" * 61, "$(id)"])
        return f"the experiment is called {experiment['name']!r}"
    if choice == 6:
        study["study"] = rng.choice(["", "../up", "/root", "a b", "shared", None, 7, "x;id", "a\nb", "ä"])
        return f"the study is called {study['study']!r}"
    if choice == 7:
        study["experiments"].append(copy.deepcopy(experiment))
        return "two experiments have one name"
    if choice == 8:
        experiment.setdefault("fixed", {})["strategy"] = rng.choice(["dpp", "", None, "FSDP", 1])
        return f"strategy is {experiment['fixed']['strategy']!r}"
    if choice == 9:
        del study[rng.choice(["study", "models", "datasets", "methods", "experiments"])]
        return "a section is missing"
    if choice == 10:
        experiment["seeds"] = [0, 1, 0]
        return "a seed is given twice"
    experiment["exclude"] = [{"method": "nobody"}]
    return "exclude matches no point"


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(deeper for key, item in inner for deeper in _places(item, (*place, key)))]


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        value = value[step]
    return value


def _small(study: dict[str, Any]) -> bool:
    """Whether planning it is quick: a thousand mutations of it are tried."""
    return len(yaml.safe_dump(study)) < 6000
