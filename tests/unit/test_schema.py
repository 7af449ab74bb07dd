"""The generated files are those that the classes give now, and the schema says about a study what the package says."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tunemap import schema
from tunemap.cli import main
from tunemap.config import METHOD_CLASSES, Factors

ROOT = Path(__file__).resolve().parents[2]
STUDIES = [ROOT / "config/config.yaml", *sorted((ROOT / "config/studies").glob("*.yaml"))]


@pytest.fixture(scope="module")
def validator() -> jsonschema.protocols.Validator:
    document = json.loads((ROOT / schema.SCHEMA_FILE).read_text())
    validator = jsonschema.Draft202012Validator
    validator.check_schema(document)
    return validator(document)


@pytest.mark.parametrize("file", sorted(schema.GENERATED))
def test_generated_files_are_in_step(file):
    assert (ROOT / file).read_text() == schema.GENERATED[file](), "run `tunemap schema`"


def test_check_names_a_stale_file_and_writing_mends_it(tmp_path, capsys):
    arguments = ["schema", "--root", str(tmp_path)]
    assert main([*arguments, "--check"]) == 1
    assert capsys.readouterr().out == "".join(
        f"{file} is out of date: run `tunemap schema`\n" for file in schema.GENERATED
    )
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    (tmp_path / schema.REFERENCE_FILE).write_text("older")
    capsys.readouterr()
    assert main([*arguments, "--check"]) == 1
    assert capsys.readouterr().out == f"{schema.REFERENCE_FILE} is out of date: run `tunemap schema`\n"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_schema_accepts_our_studies(validator, path):
    assert [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))] == []


def place(study: dict[str, Any], *steps: str | int) -> Any:
    for step in steps:
        study = study[step]  # type: ignore[index]
    return study


@pytest.mark.parametrize(
    ("steps", "change"),
    [
        ((), {"unknown": 1}),
        (("models", "tiny-qwen2"), {"unknown": 1}),
        (("models", "tiny-qwen2"), {"source": "unknown"}),
        (("datasets", "arithmetic"), {"unknown": 1}),
        (("methods", "lora"), {"unknown": 1}),
        (("methods", "lora"), {"rank": 0}),
        (("methods", "lora", "factors"), {"learning_rate": "1e-4"}),
        (("defaults",), {"unknown": 1}),
        (("defaults",), {"seed": 1}),
        (("defaults",), {"precision": "fp8"}),
        (("experiments", 0), {"unknown": 1}),
        (("experiments", 0), {"name": "a b"}),
        (("experiments", 0, "vary"), {"method.unknown": [1]}),
        (("experiments", 0, "vary"), {"gpus": 2}),
        (("experiments", 0, "vary"), {"gpus": []}),
    ],
)
def test_the_schema_refuses_what_the_package_refuses(validator, steps, change):
    study = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    place(study, *steps).update(change)
    assert not validator.is_valid(study)


def test_the_schema_knows_dotted_parameters(validator):
    study = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    study["experiments"][0]["vary"]["method.rank"] = [1, 2]
    assert validator.is_valid(study)


def test_the_reference_names_every_factor_and_every_method_parameter():
    text = schema.reference_text()
    for factor in Factors.model_fields:
        assert f"| `{factor}` |" in text
    for method in METHOD_CLASSES:
        assert f"methods: kind {method.model_fields['kind'].annotation.__args__[0]}" in text
        for name in method.model_fields:
            assert f"| `{name}` |" in text


def test_the_reference_has_one_cell_per_column():
    for line in schema.reference_text().splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5
