"""Reading a study file: YAML to a checked plan, or all of its problems at once, each with line, key and remedy."""

from __future__ import annotations

import contextlib
import copy
import datetime
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from tunemap.config import FACTOR_SECTIONS, FLAW_PATTERN, SEED, Study
from tunemap.data.locate import source_files
from tunemap.errors import UserError, nearest, unknown_key
from tunemap.hardware import load_hardware
from tunemap.models.locate import model_files
from tunemap.paths import expanded
from tunemap.scales import at_scale
from tunemap.study import Plan, plan_study

Location = tuple[str | int, ...]

MERGE_TAG = "tag:yaml.org,2002:merge"
MOST_VALUES = 100_000  # a study of 1,000 experiments has a fifth of it; aliases of aliases make billions
DEEPEST = 40  # levels of nesting; a study has 6, an alias that contains itself has no end
JSON_TYPES = ("float", "int", "str", "bool", "list", "dict")  # pydantic's steps into values of any type
LONGEST_SHOWN = 80  # characters of a wrong value that a message repeats


@dataclass(frozen=True)
class YamlFile:
    """The values of a YAML file, the line of each key, and the problems of its syntax."""

    values: Any
    lines: dict[Location, int]
    problems: list[str]


def load_plan(path: Path, *, data_root: str | None = None, scale: str | None = None) -> Plan:
    """Read a study file and expand it, at the scale that is named.

    `data_root` replaces the file's own and the scale's. Raises UserError that lists every problem of the file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such study file")
    file = read_yaml(path)
    if not isinstance(file.values, dict):
        raise UserError(
            "\n".join(f"{path}: {problem}" for problem in file.problems or ["a study is a mapping of keys"])
        )
    study, problems = _validate(dict(file.values), file)
    plan = None
    if study is not None:
        study = _chosen(study, path, data_root, scale)
        plan, found = plan_study(study)
        problems += found + _texts_for_numbers(study) + _missing_files(study)
    problems = list(dict.fromkeys(file.problems + problems))
    if problems or plan is None:
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        raise UserError("\n".join([f"{path}: {count}", *(f"  - {problem}" for problem in problems)]))
    return plan


def _chosen(study: Study, path: Path, data_root: str | None, scale: str | None) -> Study:
    """The study at a scale, with what the command line gives."""
    try:
        study = at_scale(study, scale)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return study if data_root is None else study.model_copy(update={"data_root": data_root})


def _texts_for_numbers(study: Study) -> list[str]:
    """Texts such as 1e-4 in values of any type, where no type says that a number is meant."""
    free: dict[str, Any] = {
        f"models.{name}.overrides": getattr(model, "overrides", {}) for name, model in study.models.items()
    }
    free |= {f"methods.{name}.parameters": getattr(method, "parameters", {}) for name, method in study.methods.items()}
    for experiment in study.experiments:
        free[f"experiment {experiment.name}: exclude"] = experiment.exclude
        free[f"experiment {experiment.name}: only"] = experiment.only
    return [
        f"{place}: {_text_for_number(text)}" for key, value in free.items() for place, text in _exponents(value, key)
    ]


def _exponents(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Each text in nested values that is a number with an exponent, with its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _exponents(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _exponents(inner, f"{place}[{index}]")
    elif isinstance(value, str) and "e" in value.lower() and _is_number(value):
        yield place, value


def _missing_files(study: Study) -> list[str]:
    """Files that models, datasets and hardware name and that are not there."""
    problems = []
    try:
        root = Path(expanded(study.data_root))
    except UserError as error:
        return [str(error)]
    for name, model in study.models.items():
        try:
            model_files(model, root)
        except UserError as error:
            problems.append(f"models.{name}.{error}")
        except (OSError, RuntimeError) as error:  # a name too long, a forbidden folder, an unknown ~user
            problems.append(f"models.{name}: {_in_words(error)}")
    for name, dataset in study.datasets.items():
        try:
            source_files(dataset, root)
        except UserError as error:
            problems.append(f"datasets.{name}.{error}")
        except (OSError, RuntimeError) as error:
            problems.append(f"datasets.{name}: {_in_words(error)}")
    if study.hardware.description is not None:
        try:
            load_hardware(study.hardware.description)
        except UserError as error:
            problems.append(f"hardware.description: {error}")
    return problems


def _in_words(error: OSError | RuntimeError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{_shown(error.filename)}: {error.strerror}; write another path"
    return str(error)


# --- YAML -------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> YamlFile:
    """Read YAML as Snakemake does (YAML 1.1), but with lines, and with keys that occur twice as problems."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{path}: the file is empty")
        reader = _Reader(loader)
        return YamlFile(reader.value(node, ()), reader.lines, reader.problems)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a study") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        text = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}{where}: not valid YAML: {text}") from None


class _Reader:
    """Builds the values of YAML nodes; keeps the line of each, and what is wrong although YAML allows it."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self.lines: dict[Location, int] = {}
        self.problems: list[str] = []
        self._loader = loader
        self._entries_of: dict[int, dict[str, tuple[yaml.Node, yaml.Node]]] = {}

    def value(self, node: yaml.Node, location: Location) -> Any:
        """The value of a node; raises MarkedYAMLError for what has none."""
        self.lines.setdefault(location, node.start_mark.line + 1)
        if len(location) > DEEPEST:
            raise _marked(node, f"nested more than {DEEPEST} levels deep")
        if len(self.lines) > MOST_VALUES:
            raise _marked(node, f"more than {MOST_VALUES} values, aliases counted as often as they are used")
        if isinstance(node, yaml.MappingNode):
            values = {}
            for key, (key_node, value_node) in self._entries(node, location).items():
                self.lines[*location, key] = key_node.start_mark.line + 1
                values[key] = self.value(value_node, (*location, key))
            return values
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*location, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _entries(self, node: yaml.MappingNode, location: Location) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key -> its node and its value's node; merged mappings (`<<`) are weaker than keys of the mapping itself."""
        if id(node) in self._entries_of:
            return self._entries_of[id(node)]
        self._entries_of[id(node)] = {}  # for a mapping that merges itself
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        count: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == MERGE_TAG:
                for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    if not isinstance(source, yaml.MappingNode):
                        raise _marked(source, "only a mapping can be merged with <<")
                    merged = self._entries(source, location) | merged
                continue
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else key_node.value
            if not isinstance(key, str):
                text = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                place = _place(location, key_node.start_mark.line + 1)
                self.problems.append(f"{place}a key must be text, {text} is not; write it in quotes if it is a name")
                continue
            own[key] = (key_node, value_node)
            count[key] = count.get(key, 0) + 1
        for key in [key for key, occurrences in count.items() if occurrences > 1]:
            place = _place(location, own[key][0].start_mark.line + 1)
            self.problems.append(f"{place}the key '{key}' occurs {count[key]} times; the last would win silently")
        self._entries_of[id(node)] = merged | own
        return self._entries_of[id(node)]

    def _scalar(self, node: yaml.Node) -> Any:
        """Text, number, truth value or null as YAML 1.1 reads it; pyyaml's many exceptions become one."""
        try:
            value = self._loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _marked(node, f"{_shown(node.value)} cannot be read as {kind}") from None
        if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
            raise _marked(node, f"{_shown(value)} holds half a character")
        if isinstance(value, str) and "\0" in value:
            raise _marked(node, f"{_shown(value)} holds a NUL, which no command line can pass on; remove it")
        if isinstance(value, int) and value.bit_length() > 63:
            raise _marked(node, f"{_shown(node.value)} is beyond 64 bits")
        return value


def _marked(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


# --- types ------------------------------------------------------------------------------------------------


def _validate(values: dict[str, Any], file: YamlFile) -> tuple[Study | None, list[str]]:
    """The study and its problems; parts with problems are left out so that the rest can be checked too."""
    try:
        return Study.model_validate(values), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems = list(dict.fromkeys(_message(detail, file) for detail in _most_telling(details)))
    with contextlib.suppress(ValidationError):
        study, left_out = _without_broken_parts(values, details)
        problems += [
            problem for problem in plan_study(study)[1] if not any(f"'{name}'" in problem for name in left_out)
        ]
    return None, problems


def _without_broken_parts(values: dict[str, Any], details: list[ErrorDetails]) -> tuple[Study, set[str]]:
    """The study without the entries that have errors, so that the rest is checked in the same try.

    Returns the names of entries left out too: that an experiment does not find them is no news.
    """
    kept = copy.deepcopy(values)
    left_out: set[str] = set()
    broken_experiments: set[int] = set()
    for detail in details:
        section, *inside = _location(detail)
        if section == "experiments" and inside:
            broken_experiments.add(int(inside[0]))
        elif section in ("models", "datasets", "methods", "prompt_templates", "defaults") and inside:
            kept.get(section, {}).pop(inside[0], None)
            left_out.add(str(inside[0]))
        else:
            kept.pop(str(section), None)
    if broken_experiments:
        kept["experiments"] = [item for i, item in enumerate(kept["experiments"]) if i not in broken_experiments]
    return Study.model_validate(kept), left_out


def _most_telling(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """One error per place, the innermost: a value that fits no member of a union yields errors for each member."""
    chosen: dict[Location, ErrorDetails] = {}
    for detail in details:
        place = _location(detail)
        known = chosen.get(place)
        if known is None or known["type"] in ("none_required", "int_type"):
            chosen[place] = detail
    outer = {place[:depth] for place in chosen for depth in range(len(place))}
    return [detail for place, detail in chosen.items() if place not in outer]


def _message(detail: ErrorDetails, file: YamlFile) -> str:
    location = _location(detail)
    value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        section = _section_at(detail["loc"][:-1])
        if location[-1] == SEED and section in FACTOR_SECTIONS:
            wanted = _shown(value if isinstance(value, list) else [value])
            inside = _place(location[:-1], _line(location, file.lines))
            return f"{inside}unknown key '{SEED}': seeds are given to an experiment, as seeds: {wanted}"
        known = [info.alias or name for name, info in section.model_fields.items()] if section else []
        return _place(location[:-1], _line(location, file.lines)) + unknown_key(str(location[-1]), known)
    place = _place(location, _line(location, file.lines))
    if kind == "missing":
        section = _section_at(detail["loc"][:-1])
        field = section.model_fields.get(str(location[-1])) if section else None
        meaning = f" ({field.description})" if field and field.description else ""
        inside = _place(location[:-1], _line(location[:-1], file.lines))
        return f"{inside}the key '{location[-1]}' is missing{meaning}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        key = str(context["discriminator"]).strip("'")
        tags = ", ".join(_tags(detail["loc"], key))
        given_value = f", not {_shown(value.get(key))}" if isinstance(value, dict) and key in value else ""
        return f"{place}'{key}' must be one of {tags}{given_value}"
    if kind == "literal_error":
        allowed = str(context["expected"]).replace("'", "")
        meant = nearest(str(value), [word.strip() for word in allowed.replace(" or ", ", ").split(",")])
        return f"{place}{_shown(value)} is not allowed{f'; did you mean {meant}?' if meant else '.'} Allowed: {allowed}"
    if isinstance(value, str) and kind.startswith(("float", "int")) and _is_number(value):
        return f"{place}{_text_for_number(value)}"
    return f"{place}{'the value is empty' if value is None else f'{_shown(value)} is not allowed'}: {_due(detail)}"


def _text_for_number(value: str) -> str:
    return f"{value!r} is text to YAML 1.1, not a number; write {_as_yaml_number(value)}"


def _due(detail: ErrorDetails) -> str:
    """What the value should be, in the words of a study file."""
    kind = detail["type"]
    if kind.startswith(("model_", "dict_")):
        return "it should be a mapping of keys to values"
    if kind == "string_pattern_mismatch" and detail["ctx"]["pattern"] == FLAW_PATTERN:
        return "known flaws are F01 to F44, as docs/validity.md numbers them"
    if kind == "string_pattern_mismatch":
        return "a name is made of letters, digits, '_', '.' and '-', and begins with a letter or digit"
    return detail["msg"].replace("Input should", "it should")


def _shown(value: Any) -> str:
    """A wrong value as the file has it, cut where it is long."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = value.isoformat() if isinstance(value, datetime.date) else repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _location(detail: ErrorDetails) -> Location:
    """Where an error is in the file; of a name that is wrong itself, pydantic adds `[key]` to its place."""
    location = detail["loc"]
    if len(location) > 1 and location[-1] == "[key]" and detail["type"] != "extra_forbidden":
        location = location[:-1]
    return _without_union_steps(location)


def _line(location: Location, lines: dict[Location, int]) -> int | None:
    """The line of the nearest place that has one; none for the file as a whole."""
    while location and location not in lines:
        location = location[:-1]
    return lines[location] if location else None


def _place(location: Location, line: int | None) -> str:
    """`line 7, experiments[0].vary: `, as much of it as there is."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else (f".{step}" if path else str(step))
    parts = [*([f"line {line}"] if line is not None else []), *([path] if path else [])]
    return ", ".join(parts) + (": " if parts else "")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _as_yaml_number(text: str) -> str:
    """The number as YAML 1.1 reads it: an exponent needs a decimal point and a sign."""
    if not math.isfinite(float(text)):
        return "a finite number"
    mantissa, _, exponent = text.lower().partition("e")
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{mantissa}e{int(exponent):+d}" if exponent else mantissa


def _without_union_steps(location: Location) -> Location:
    """The location as it is in the file: pydantic adds the tag of a discriminated union or a type's name."""
    return tuple(step for step, real in _walk(location) if real)


def _section_at(location: Location) -> type[BaseModel] | None:
    """The section class that a location of an error leads to."""
    annotation: Any = Study
    for step, real in _walk(location):
        annotation = _member(annotation, step) if real else _choose(annotation, step)
    annotation = _bare(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _walk(location: Location) -> list[tuple[str | int, bool]]:
    """Each step of a location, and whether it is a key of the file (or a step of pydantic's own)."""
    steps: list[tuple[str | int, bool]] = []
    annotation: Any = Study
    for step in location:
        union = _is_union(annotation) or (annotation in (typing.Any, JsonValue) and step in JSON_TYPES)
        annotation = _choose(annotation, step) if union else _member(annotation, step)
        steps.append((step, not union))
    return steps


def _bare(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _is_union(annotation: Any) -> bool:
    annotation = _bare(annotation)
    if get_origin(annotation) not in (Union, types.UnionType):
        return False
    return len([member for member in get_args(annotation) if member is not type(None)]) > 1


def _choose(annotation: Any, step: str | int) -> Any:
    """The member of a union that pydantic's step names: by tag for sections, else by type name."""
    for member in get_args(_bare(annotation)):
        member = _bare(member)
        if isinstance(member, type) and issubclass(member, BaseModel):
            for field in member.model_fields.values():
                if get_origin(field.annotation) is Literal and step in get_args(field.annotation):
                    return member
    return typing.Any


def _member(annotation: Any, step: str | int) -> Any:
    annotation = _bare(annotation)
    if get_origin(annotation) in (Union, types.UnionType):  # an optional value
        annotation = _bare(next(member for member in get_args(annotation) if member is not type(None)))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            if step in (name, field.alias):
                return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        return typing.Any
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return arguments[1]
    return arguments[0] if arguments else typing.Any


def _tags(location: Location, discriminator: str) -> list[str]:
    """The allowed tags of the union at a location."""
    annotation: Any = Study
    for step, real in _walk(location):
        annotation = _member(annotation, step) if real else _choose(annotation, step)
    members = [_bare(member) for member in get_args(_bare(annotation))]
    return [str(tag) for member in members for tag in get_args(member.model_fields[discriminator].annotation)]
