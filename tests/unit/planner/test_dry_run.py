"""When a command line of Snakemake gets the planning table."""

import pytest

from tunemap.planner.dry_run import wants_table


@pytest.mark.parametrize("arguments", [["-n"], ["--dry-run"], ["--dryrun"], ["-np"], ["-pn"], ["-c", "2", "-n", "all"]])
def test_a_dry_run_gets_the_table(arguments):
    assert wants_table(arguments, {})


@pytest.mark.parametrize(
    "arguments",
    [[], ["-c2"], ["--cores", "2"], ["--configfile", "study-n.yaml"], ["-n", "--rulegraph"], ["-n", "--summary"],
     ["-n", "--quiet"], ["--lint"], ["-j", "1"]],
)  # fmt: skip
def test_nothing_else_does(arguments):
    assert not wants_table(arguments, {})


def test_the_environment_can_turn_it_off():
    assert not wants_table(["-n"], {"TUNEMAP_PLANNING": "off"})
