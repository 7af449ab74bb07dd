"""Files generated from the study's classes: the JSON schema and the reference page, so that neither can drift."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tunemap.config import (
    METHOD_CLASSES,
    SEED,
    DatasetConfig,
    Experiment,
    Factors,
    Hardware,
    HubModel,
    LocalModel,
    RandomModel,
    Report,
    Scale,
    ScaledExperiment,
    Study,
    TinyModel,
)
from tunemap.files import write_atomic

SCHEMA_FILE = Path("workflow/schemas/config.schema.json")
REFERENCE_FILE = Path("config/README.md")

INTRODUCTION = """\
# The study file

A study is one YAML file. `config/config.yaml` is the default study; others lie in `config/studies/` and run with
`snakemake --profile profiles/local --configfile config/studies/NAME.yaml`, in place of the default one, never
merged with it. `tunemap plan FILE` checks a file and lists its runs; all problems are named at once, with the line,
the key and what is allowed. Editors that know JSON schemas complete and check keys with
`# yaml-language-server: $schema=../workflow/schemas/config.schema.json` as the first line.

Values are taken from the strongest place that sets them: an experiment's `vary`, its `fixed`, the method's
`factors`, `defaults`, and last the default printed here. `tunemap explain RUN` prints which one it was.

A study may name other sizes of itself under `scales`: `tunemap plan FILE --scale NAME` lists the runs of one, and
`snakemake ... --config scale=NAME` runs it, with results in `results/STUDY-NAME/`.

Write small numbers with a point: YAML reads `1e-4` as text, `1.0e-4` as a number.

This page is made from the source by `tunemap schema`.
"""


def schema_text() -> str:
    """The JSON schema of a study file."""
    schema = Study.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A TuneMap study", **schema}
    return json.dumps(schema, indent=1) + "\n"


def reference_text() -> str:
    """The reference page of every key, in Markdown."""
    sections: list[tuple[str, type[Any]]] = [
        ("The study", Study),
        ("models: source hub", HubModel),
        ("models: source local", LocalModel),
        ("models: source random", RandomModel),
        ("models: source tiny", TinyModel),
        ("datasets", DatasetConfig),
        *[(f"methods: kind {_literal(method, 'kind')}", method) for method in METHOD_CLASSES],
        ("experiments", Experiment),
        ("Factors: in defaults, fixed, vary, and methods.*.factors", Factors),
        ("hardware", Hardware),
        ("report", Report),
        ("scales", Scale),
        ("scales: experiments", ScaledExperiment),
    ]
    parts = [INTRODUCTION]
    for title, model in sections:
        without = SEED if model is Factors else None  # a run has it, no section sets it
        parts.append(f"\n## {title}\n\n{(model.__doc__ or '').strip()}\n\n{_table(model, without)}")
    parts.append(
        "\nIn `fixed` and `vary`, `model`, `dataset` and `method` choose entries by name, and `method.rank` and its\n"
        "kind set a parameter of the method; methods without that parameter ignore it. Seeds are set by `seeds` of an\n"
        "experiment alone. Runs that come out the same, in one experiment or in several, are run once.\n"
    )
    return "".join(parts)


def _literal(model: type[Any], field: str) -> str:
    return str(model.model_fields[field].annotation.__args__[0])


def _table(model: type[Any], without: str | None = None) -> str:
    properties = model.model_json_schema(by_alias=True)["properties"]
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name == without:
            continue
        key = field.alias or name
        default = "required" if field.is_required() else _default(field)
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{key}` | {_values(properties[key])} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(field: Any) -> str:
    if field.default_factory is not None:
        return "empty"
    return f"`{json.dumps(field.default)}`"


def _values(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(member) for member in schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_values(schema.get('items', {}))}"
    if "$ref" in schema or "oneOf" in schema or schema.get("type") == "object":
        return "mapping"
    kind = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
    words = kind.get(str(schema.get("type")), "any")
    for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("maximum", "≤")):
        if key in schema:
            words += f" {sign} {schema[key]:g}"
    return words


GENERATED = {SCHEMA_FILE: schema_text, REFERENCE_FILE: reference_text}


def add_schema_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap schema`."""
    parser.add_argument("--check", action="store_true", help="only say whether the files are up to date")
    parser.add_argument("--root", type=Path, default=Path(), help="root of the checkout (default: here)")


def run_schema(arguments: argparse.Namespace) -> int:
    """Write the generated files, or say which of them are out of date."""
    stale = [path for path, text in GENERATED.items() if not _is_current(arguments.root / path, text())]
    for path in stale:
        if arguments.check:
            print(f"{path} is out of date: run `tunemap schema`")
        else:
            write_atomic(arguments.root / path, GENERATED[path]())
            print(f"wrote {path}")
    return int(bool(stale) and arguments.check)


def _is_current(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text
