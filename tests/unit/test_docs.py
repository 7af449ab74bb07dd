"""The documentation keeps its promises: links lead somewhere, commands exist, study files in it are valid."""

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

from tunemap.cli import COMMANDS
from tunemap.study_file import load_plan

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


STUDIES = [
    pytest.param(block, id=name)
    for page, name in zip(PAGES, NAMES, strict=True)
    for block in blocks(page, "yaml")
    if "study:" in block
]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_scripts_that_are_named_exist(page):
    text = "\n".join(blocks(page, "sh"))
    named = set(re.findall(r"^(?:PYTHONPATH=\S+ \S+ -m tunemap\.cli|tunemap) ([a-z-]+)", text, flags=re.MULTILINE))
    assert named <= {command.name for command in COMMANDS}
    targets = set(re.findall(r"^make (\w+)", text, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


WITHOUT_JOBS = (" -n", " --report", " --rulegraph", " --unlock", " --lint", " --help")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_that_run_the_workflow_say_with_how_many_cores(page):
    """Snakemake refuses to run a job without --cores, which the profiles give."""
    text = page.read_text()
    lines = [line.split(" #")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]
    commands = [one for one in (*lines, *re.findall(r"`([^`\n]+)`", text)) if one.startswith("snakemake ")]
    runs = [one for one in commands if not any(option in one for option in WITHOUT_JOBS)]
    assert [one for one in runs if "--profile" not in one and "--cores" not in one] == []


@pytest.mark.parametrize("block", STUDIES)
def test_studies_in_the_documentation_are_valid(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"question": "?", "answer": "!"}) + "\n")
    (tmp_path / "study.yaml").write_text(block)
    plan = load_plan(tmp_path / "study.yaml")
    assert len(plan.runs) >= 6


def test_there_are_studies_in_the_documentation():
    assert len(STUDIES) >= 2


def test_citation_says_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_page_on_performance_says_what_was_measured(repository):
    benchmark = runpy.run_path(str(repository / "benchmarks" / "performance.py"))
    assert benchmark["page"]() == (repository / "docs" / "performance.md").read_text()
    assert benchmark["page"](repository / "absent").count("\n## ") == 0  # nothing is said of what was not measured
