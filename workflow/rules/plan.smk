# At a dry run, what each run needs and whether it fits, before the jobs. No rules: nothing is made.
import subprocess

from tunemap.planner.dry_run import wants_table


def _planning_command():
    """Predict in a process of its own, for torch stays out of this one; what it computed serves later dry runs."""
    given = workflow.config_settings.config or {}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return [
        sys.executable,
        "-m",
        "tunemap.cli",
        "plan",
        str(STUDY_FILE),
        "--predict",
        *options,
    ]


if wants_table(sys.argv[1:], os.environ):
    subprocess.run(
        _planning_command(),
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(
                [str(CHECKOUT / "src"), os.environ.get("PYTHONPATH", "")]
            )
        },
    )
