"""Names that a shell would take for commands are names: in the checkout's path, in data_root, in the study's file."""

import re
import subprocess

import pytest

from tests.small_study import STUDY

from .conftest import Checkout, make_checkout

HOSTILE = 'it\'s $(touch pwned) `touch pwned` "x"; touch pwned &'
# What a rule may put into its command without quotes: chosen from a list, a number, or of letters, digits and .-_+
PLAIN = re.compile(r"(input|output|log|wildcards|resources|threads)\b|params\.(device|backend)$")


def test_every_text_that_a_study_gives_is_quoted_in_the_commands(repository):
    fields = []
    for file in sorted((repository / "workflow" / "rules").glob("*.smk")):
        for command in re.findall(r"^    shell:\n((?:        .*\n)+)", file.read_text(), flags=re.MULTILINE):
            fields += re.findall(r"\{(.+?)\}", command)
    assert len(fields) > 50
    assert [field for field in fields if not field.endswith(":q") and not PLAIN.match(field)] == []


@pytest.mark.parametrize("place", ["study", "models", "datasets", "methods", "experiments"])
@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "$(touch pwned)", "a b", "a;b", "-x", ".hidden", "a\n", ""])
def test_names_of_a_study_are_plain(tmp_path, place, name):
    from tunemap.errors import UserError
    from tunemap.study_file import load_plan

    checkout = Checkout(tmp_path)
    study = dict(STUDY)
    if place == "study":
        study["study"] = name
    elif place == "experiments":
        study["experiments"] = [study["experiments"][0] | {"name": name}]
    else:
        study[place] = study[place] | {name: next(iter(study[place].values()))}
    checkout.write_study(study)
    with pytest.raises(UserError, match=r"letters, digits|pattern|at least 1 char"):
        load_plan(checkout.study_file)


def test_a_shell_runs_nothing_that_is_a_name(repository, tmp_path):
    plain = make_checkout(repository, tmp_path / "plain")
    checkout = Checkout(tmp_path / HOSTILE)
    plain.root.rename(checkout.root)
    data_root = HOSTILE.replace("$", "")  # a variable there, and one that is not set is refused
    (checkout.root / "data").rename(checkout.root / data_root)
    checkout.write_study(checkout.study() | {"data_root": data_root})
    checkout.study_file.rename(checkout.root / f"{HOSTILE}.yaml")
    command = [word.replace("study.yaml", f"{HOSTILE}.yaml") for word in checkout.command("--until", "prepare_dataset")]
    done = subprocess.run(command, cwd=checkout.root, env=checkout.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((checkout.root / "results" / "shared" / "datasets").glob("*/train.jsonl"))
    assert list(tmp_path.rglob("pwned")) == []
