"""Reading a study file: YAML to a checked plan, or all of its problems at once, each with line, key and remedy."""

from __future__ import annotations

import contextlib
import copy
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunemap.config import Study
from tunemap.data.locate import source_files
from tunemap.errors import UserError, nearest, unknown_key
from tunemap.models.locate import model_files
from tunemap.paths import expanded
from tunemap.study import Plan, plan_study

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlFile:
    """The values of a YAML file, the line of each key, and the problems of its syntax."""

    values: Any
    lines: dict[Location, int]
    problems: list[str]


def load_plan(path: Path, *, data_root: str | None = None) -> Plan:
    """Read a study file and expand it.

    `data_root` replaces the file's own. Raises UserError that lists every problem of the file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such study file")
    file = read_yaml(path)
    if not isinstance(file.values, dict):
        raise UserError(
            "\n".join(f"{path}: {problem}" for problem in file.problems or ["a study is a mapping of keys"])
        )
    values = dict(file.values)
    if data_root is not None:
        values["data_root"] = data_root
    study, problems = _validate(values, file)
    plan = None
    if study is not None:
        plan, found = plan_study(study)
        problems += found + _missing_files(study)
    problems = list(dict.fromkeys(file.problems + problems))
    if problems or plan is None:
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        raise UserError("\n".join([f"{path}: {count}", *(f"  - {problem}" for problem in problems)]))
    return plan


def _missing_files(study: Study) -> list[str]:
    """Local files that models and datasets name and that are not there."""
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
    for name, dataset in study.datasets.items():
        try:
            source_files(dataset, root)
        except UserError as error:
            problems.append(f"datasets.{name}.{error}")
    return problems


# --- YAML -------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> YamlFile:
    """Read YAML as Snakemake does (YAML 1.1), but with lines, and with keys that occur twice as problems."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    file = YamlFile(None, {}, [])
    if node is None:
        raise UserError(f"{path}: the file is empty")
    try:
        return YamlFile(_construct(loader, node, (), file), file.lines, file.problems)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def _construct(loader: yaml.SafeLoader, node: yaml.Node, location: Location, file: YamlFile) -> Any:
    file.lines[location] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in sorted({key for key in written if key != "<<" and written.count(key) > 1}):
            place = _place(location, file.lines)
            file.problems.append(
                f"{place}the key '{key}' occurs {written.count(key)} times; the last would win silently"
            )
        loader.flatten_mapping(node)
        values = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            try:
                hash(key)
            except TypeError:
                raise ValueError(f"line {key_node.start_mark.line + 1}: a key must be text") from None
            values[key] = _construct(loader, value_node, (*location, key), file)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*location, index), file) for index, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


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
        section, *inside = _without_union_steps(detail["loc"])
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
    """One error per place: a value that fits no member of a union yields one error per member."""
    chosen: dict[Location, ErrorDetails] = {}
    for detail in details:
        place = _without_union_steps(detail["loc"])
        known = chosen.get(place)
        if known is None or known["type"] in ("none_required", "int_type"):
            chosen[place] = detail
    return list(chosen.values())


def _message(detail: ErrorDetails, file: YamlFile) -> str:
    location = _without_union_steps(detail["loc"])
    value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        section = _section_at(detail["loc"][:-1])
        known = [info.alias or name for name, info in section.model_fields.items()] if section else []
        return _place(location[:-1], file.lines, location) + unknown_key(str(location[-1]), known)
    place = _place(location, file.lines)
    if kind == "missing":
        section = _section_at(detail["loc"][:-1])
        field = section.model_fields.get(str(location[-1])) if section else None
        meaning = f" ({field.description})" if field and field.description else ""
        return f"{_place(location[:-1], file.lines)}the key '{location[-1]}' is missing{meaning}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        key = str(context["discriminator"]).strip("'")
        tags = ", ".join(_tags(detail["loc"], key))
        given_value = f", not '{context['tag']}'" if "tag" in context else ""
        return f"{place}'{key}' must be one of {tags}{given_value}"
    if kind == "literal_error":
        allowed = str(context["expected"]).replace("'", "")
        meant = nearest(str(value), [word.strip() for word in allowed.replace(" or ", ", ").split(",")])
        return f"{place}{value!r} is not allowed{f'; did you mean {meant}?' if meant else '.'} Allowed: {allowed}"
    if isinstance(value, str) and kind.startswith(("float", "int")) and _is_number(value):
        return f"{place}{value!r} is text to YAML 1.1, not a number; write {_as_yaml_number(value)}"
    if value is None:
        return f"{place}the value is empty; {_lower(detail['msg'])}"
    return f"{place}{value!r} is not allowed: {_lower(detail['msg'])}"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:].replace("Input should", "it should")


def _place(location: Location, lines: dict[Location, int], line_of: Location | None = None) -> str:
    """`line 7, experiments[0].vary: ` with the line of the nearest place that has one."""
    wanted = location if line_of is None else line_of
    while wanted and wanted not in lines:
        wanted = wanted[:-1]
    line = lines.get(wanted)
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else (f".{step}" if path else str(step))
    parts = [f"line {line}"] if line is not None and location else []
    return ", ".join([*parts, *([path] if path else [])]) + (": " if path else "")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _as_yaml_number(text: str) -> str:
    """The number as YAML 1.1 reads it: an exponent needs a decimal point and a sign."""
    number = float(text)
    if number == int(number) and abs(number) < 1e15 and "e" not in text.lower() and "." not in text:
        return text
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
        union = _is_union(annotation)
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
