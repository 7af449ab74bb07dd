"""A capture by Nsight Systems: one report per node, only the steps of the window, exported to SQLite in the same job.

`nsys` is run around the command that starts the processes; these open and close the window themselves
(cudaProfilerStart and Stop, every rank between two barriers). Which options this very nsys knows is read from its own
help: an option that it lacks is left out and named in capture.json. Whether a capture worked is told by the report
that it left, not by its exit code: nsys has ended with 0 without a report, and with an error beside a good one.

Documentation: https://docs.nvidia.com/nsight-systems/UserGuide/index.html (CLI options; SQLite export).
"""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

TRACED = ("cuda", "nvtx", "cublas", "cudnn")
# Not stop-shutdown, the default, which ends the program with the window. Without sampling no privilege is needed.
OPTIONS = {
    "--force-overwrite": "true",
    "--sample": "none",
    "--cpuctxsw": "none",
    "--capture-range": "cudaProfilerApi",
    "--capture-range-end": "stop",
    "--kill": "none",
    "--cuda-graph-trace": "node",  # or kernels of compiled models are missing
}
# Payloads of NVTX ranges are blobs: NCCL's hold the sizes of messages.
EXPORT_OPTIONS = {"--type": "sqlite", "--force-overwrite": "true", "--lazy": "false", "--include-blobs": "true"}
KEPT_TABLES = ("CUPTI_ACTIVITY_KIND_", "NVTX_", "TARGET_INFO_GPU", "TARGET_INFO_CUDA_DEVICE",
               "TARGET_INFO_SESSION_START_TIME", "StringIds", "ENUM_", "DIAGNOSTIC_EVENT", "CUDA_GRAPH",
               "META_DATA_EXPORT", "EXPORT_META_DATA")  # fmt: skip
STRING_COLUMNS = ("demangledName", "shortName", "mangledName", "nameId", "textId")
NEEDED = ("--capture-range", "--capture-range-end", "--type")
REPORT_PREFIX = "nsys."
HELP_LIMIT_S = 60.0
EXPORT_LIMIT_S = 1800.0


class NsysError(Exception):
    """nsys is not there, too old, or left no report."""


@dataclass(frozen=True)
class Nsys:
    """An installed nsys, with what it can do of what is wanted.

    dropped: options and traced interfaces that it does not know.
    """

    executable: str
    version: str
    profile_options: tuple[str, ...]
    export_options: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def described(self) -> dict[str, object]:
        """What capture.json says of it."""
        return {"nsys_version": self.version, "nsys_options_dropped": list(self.dropped)}

    def around(self, command: Sequence[str], folder: Path) -> list[str]:
        """`command` under nsys: one for all processes of a node, and a report per node where srun starts several."""
        program = list(command).index(sys.executable)
        report = str(folder / f"{REPORT_PREFIX}%h")
        return [*command[:program], self.executable, "profile", f"--output={report}", *self.profile_options,
                *command[program:]]  # fmt: skip

    def export(self, folder: Path) -> list[Path]:
        """SQLite files of the reports in `folder`, made by the nsys that wrote these: a newer one's are unreadable."""
        reports = sorted([*folder.glob(f"{REPORT_PREFIX}*.nsys-rep"), *folder.glob(f"{REPORT_PREFIX}*.qdrep")])
        if not reports:
            left = sorted(path.name for path in folder.glob(f"{REPORT_PREFIX}*"))
            raise NsysError(f"nsys left no report, only {', '.join(left) or 'nothing'}: was its importer installed?")
        exports = []
        for report in reports:
            export = report.with_name(f"trace.{report.name.removeprefix(REPORT_PREFIX)}").with_suffix(".sqlite")
            command = [self.executable, "export", *self.export_options, f"--output={export}", str(report)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=EXPORT_LIMIT_S)
            if not export.exists():
                last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
                raise NsysError(f"nsys exported nothing of {report.name}: {last[0]}")
            scrub(export)
            report.unlink()  # it holds the environment of the processes, and the export says all that is read
            exports.append(export)
        return exports


def scrub(export: Path) -> None:
    """Keep only the tables and strings that are read: others hold environment variables, command lines, user names."""
    with closing(sqlite3.connect(export)) as connection:
        connection.text_factory = bytes  # names need not be UTF-8
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        tables = [name.decode() for (name,) in rows]
        for table in tables:
            if not table.startswith(KEPT_TABLES) and not table.startswith("sqlite_"):
                connection.execute(f'DROP TABLE "{table}"')
        used = []
        for table in {*tables} - {"StringIds"}:
            if table.startswith(KEPT_TABLES):
                columns = [row[1].decode() for row in connection.execute(f'PRAGMA table_info("{table}")')]
                used += [f'SELECT "{name}" FROM "{table}"' for name in columns if name in STRING_COLUMNS]
        if "StringIds" in tables:
            keep = " UNION ".join(used) or "SELECT 0 WHERE 0"
            connection.execute("CREATE TEMP TABLE used (id INTEGER PRIMARY KEY)")
            connection.execute(f"INSERT OR IGNORE INTO used {keep}")
            connection.execute("DELETE FROM StringIds WHERE id NOT IN (SELECT id FROM used)")
        connection.commit()
        connection.execute("VACUUM")  # deleted rows stay in free pages until then


def installed() -> bool:
    """Whether there is an nsys on the PATH."""
    return shutil.which("nsys") is not None


def probe() -> Nsys:
    """The nsys on the PATH and the options of ours that its help names.

    Raises NsysError where there is none, or none that can capture a window.
    """
    executable = shutil.which("nsys")
    if executable is None:
        raise NsysError("profile is nsys, and there is no nsys on the PATH; install it, or use torch or auto")
    version, profile_help, export_help = (
        _output(executable, *words) for words in (("--version",), ("profile", "--help"), ("export", "--help"))
    )
    traced = [name for name in TRACED if re.search(rf"\b{name}\b", profile_help)]
    profile_options, export_options = _known(OPTIONS, profile_help), _known(EXPORT_OPTIONS, export_help)
    dropped = [*(OPTIONS.keys() - profile_options.keys()), *(EXPORT_OPTIONS.keys() - export_options.keys())]
    if lacking := [name for name in NEEDED if name in dropped]:
        raise NsysError(f"nsys {version.strip()} does not know {', '.join(lacking)}; use a newer one, or profile torch")
    return Nsys(
        executable=executable,
        version=version.strip(),
        profile_options=(
            f"--trace={','.join(traced)}",
            *(f"{name}={value}" for name, value in profile_options.items()),
        ),
        export_options=tuple(f"{name}={value}" for name, value in export_options.items()),
        dropped=(*sorted(dropped), *(f"--trace={name}" for name in TRACED if name not in traced)),
    )


def _known(options: dict[str, str], help_text: str) -> dict[str, str]:
    """Those of `options` that a help names."""
    return {name: value for name, value in options.items() if re.search(rf"{name}\b(?!-)", help_text)}


def _output(executable: str, *words: str) -> str:
    done = subprocess.run(
        [executable, *words], capture_output=True, text=True, errors="replace", timeout=HELP_LIMIT_S, check=False
    )
    return f" {done.stdout}\n{done.stderr} "
