"""The `tunemap` command: look at a study before and after it runs, and at data and traces of any origin.

Running a study is Snakemake's work (`snakemake --profile profiles/local`); nothing here trains.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from tunemap.errors import UserError


@dataclass(frozen=True)
class Command:
    """A subcommand; its module is imported only when it is used or asked for help."""

    name: str
    summary: str
    module: str
    add_arguments: str
    run: str


COMMANDS = (
    Command("plan", "list the runs of a study, and what each will need", "tunemap.inspect",
            "add_plan_arguments", "run_plan"),
    Command("advise", "methods, strategies and batches that fit a model on given GPUs",
            "tunemap.planner.advise_command", "add_advise_arguments", "run_advise"),
    Command("max-batch", "the largest batch or length of a run that a device holds",
            "tunemap.planner.max_batch_command", "add_max_batch_arguments", "run_max_batch"),
    Command("explain", "every factor of a run, and where its value came from", "tunemap.inspect",
            "add_explain_arguments", "run_explain"),
    Command("diff", "the factors in which two runs differ", "tunemap.inspect", "add_diff_arguments", "run_diff"),
    Command("status", "how far a study is: what waits, trains, has ended, or failed and why", "tunemap.status",
            "add_status_arguments", "run_status"),
    Command("retry", "forget failed runs, so that the next start repeats them", "tunemap.inspect",
            "add_retry_arguments", "run_retry"),
    Command("gc", "list or remove results that no run of a study uses any more", "tunemap.inspect",
            "add_gc_arguments", "run_gc"),
    Command("verify", "derive the tables of a study again and compare", "tunemap.verify",
            "add_verify_arguments", "run_verify"),
    Command("methods", "every fine-tuning method by name, and which do not run and why", "tunemap.methods.command",
            "add_methods_arguments", "run_methods"),
    Command("figure", "draw one figure of a study again", "tunemap.report.command",
            "add_figure_arguments", "run_figure"),
    Command("export-tracker", "runs for TensorBoard, Weights & Biases, MLflow or trackio", "tunemap.report.trackers",
            "add_export_tracker_arguments", "run_export_tracker"),
    Command("data-stats", "lengths, truncation, padding and packing of a dataset", "tunemap.data.command",
            "add_data_stats_arguments", "run_data_stats"),
    Command("facts", "kernels, phases and communication of a profile", "tunemap.trace.command",
            "add_facts_arguments", "run_facts"),
    Command("ceiling", "measure this device's fastest matrix product", "tunemap.measure.ceiling",
            "add_ceiling_arguments", "run_ceiling"),
    Command("schema", "write or check the files generated from the study's classes", "tunemap.schema",
            "add_schema_arguments", "run_schema"),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for a wrong command line, 1 for a problem that it explains)."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="tunemap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runners: dict[str, Callable[[argparse.Namespace], int]] = {}
    for command in COMMANDS:
        subparser = commands.add_parser(command.name, help=command.summary, description=command.summary)
        if command.name in words[:1]:
            module = importlib.import_module(command.module)
            getattr(module, command.add_arguments)(subparser)
            runners[command.name] = getattr(module, command.run)
    values = parser.parse_args(words)
    try:
        return runners[values.command](values)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:  # a file that cannot be read or written, a full disk
        place = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"error: {place}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
