"""The command line: help of every command, one line and an exit code for what a user can mend, no traceback."""

import os
import re
import subprocess
import sys

import pytest

from tunemap import inspect
from tunemap.cli import COMMANDS, main


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: tunemap {command} ")
    assert next(known.summary for known in COMMANDS if known.name == command).split()[0] in output


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^ +{command.name}\b", output, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["plna"],
        ["plan", "--wrong"],
        ["plan", "--list", "--predict"],
        ["explain"],
        ["diff", "one"],
        ["--wrong"],
        ["--"],
    ],
)
def test_a_wrong_command_line_ends_with_2_and_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: tunemap")


def test_a_wrong_command_names_the_right_ones(capsys):
    with pytest.raises(SystemExit):
        main(["plna"])
    error = capsys.readouterr().err
    assert "plna" in error
    assert "plan" in error.replace("plna", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nowhere.yaml"], "error: nowhere.yaml: no such study file\n"),
        (["explain", "x", "--study", "nowhere.yaml"], "error: nowhere.yaml: no such study file\n"),
        (["diff", "a.json", "b.json"], "error: a.json: no such file\n"),
        (["retry", "nowhere.yaml"], "error: nowhere.yaml: no such study file\n"),
        (["gc", "nowhere.yaml"], "error: nowhere.yaml: no such study file\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_1(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err == message
    assert captured.out == ""


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (NotADirectoryError(20, "Not a directory", "results/x"), "error: results/x: Not a directory\n"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device\n"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line_and_1(problem, message, capsys, monkeypatch):
    def fail(arguments):
        raise problem

    monkeypatch.setattr(inspect, "run_plan", fail)
    assert main(["plan"]) == 1
    assert capsys.readouterr().err == message


def tunemap(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": "src"}
    return subprocess.run(
        [sys.executable, "-m", "tunemap.cli", *arguments], capture_output=True, text=True, env=environment, **options
    )


def test_as_a_process(repository):
    assert tunemap("plan", "nowhere.yaml", cwd=repository).returncode == 1
    assert tunemap("nothing", cwd=repository).returncode == 2


def test_a_reader_that_has_seen_enough_is_no_error(repository):
    code = f"{sys.executable} -m tunemap.cli plan --json --list | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, cwd=repository, env=os.environ | {"PYTHONPATH": "src"}
    )
    assert (done.stdout, done.stderr, done.returncode) == ("{\n", "", 0)


def test_planning_imports_nothing_heavy(repository):
    """Snakemake parses the plan in every job; torch alone would cost seconds each time."""
    code = (
        "import sys; from tunemap.cli import main; main(['plan', 'config/config.yaml', '--json', '--list']); "
        "import tunemap.planner.cache; "
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'numpy', 'snakemake', 'datasets'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=repository,
        env=os.environ | {"PYTHONPATH": "src"},
    )
    assert (done.returncode, done.stderr) == (0, "")
