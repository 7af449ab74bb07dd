"""A stand-in for nsys, which is not installed where tests run: notes its arguments and "exports" a made file.

It is told what to do by files beside it: profile_help and export_help are printed, export.sqlite is what a report
becomes, no_report makes it end with 0 and no report; arguments.json gets every call.
"""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CALLS = HERE / "arguments.json"
HELP = {
    "profile": """
    --trace=  Possible values are 'cuda', 'nvtx', 'cublas', 'cublas-verbose', 'cudnn', 'osrt'.
    -o, --output=   --force-overwrite=   --sample=   --cpuctxsw=   --capture-range=   --capture-range-end=
    --kill=   --cuda-graph-trace=""",
    "export": "--type=   --output=   --force-overwrite=   --lazy=   --include-blobs=",
}


def install(folder: Path, made: Path, **helps: str) -> Path:
    """Put an executable `nsys` in `folder`; `helps` replaces what it says of its options."""
    folder.mkdir(exist_ok=True)
    shutil.copy(made, folder / "export.sqlite")
    for name, text in (HELP | helps).items():
        (folder / f"{name}_help").write_text(text)
    nsys = folder / "nsys"
    nsys.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
    nsys.chmod(0o755)
    return folder


def calls(folder: Path) -> list[list[str]]:
    """Every command line so far."""
    return json.loads((folder / "arguments.json").read_text())


def _run_from_a_thread_that_ends(command: list[str]) -> None:
    """As a profiler may: whoever asks the kernel to be killed with its parent is killed with the thread."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(subprocess.Popen(command))
        time.sleep(2)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    started[0].wait()


def main(words: list[str]) -> int:
    """Do what nsys would do."""
    known = json.loads(CALLS.read_text()) if CALLS.exists() else []
    CALLS.write_text(json.dumps([*known, words]))
    if words == ["--version"]:
        print("NVIDIA Nsight Systems version 2023.4.4.54-stand-in")
        return 0
    command, *rest = words
    if rest == ["--help"]:
        print((HERE / f"{command}_help").read_text())
        return 0
    output = next(word.removeprefix("--output=") for word in rest if word.startswith("--output="))
    if command == "export":
        shutil.copy(HERE / "export.sqlite", output)
        return 0
    program = next(index for index, word in enumerate(rest) if not word.startswith("-"))
    _run_from_a_thread_that_ends(rest[program:])
    if not (HERE / "no_report").exists():
        Path(output.replace("%h", socket.gethostname()) + ".nsys-rep").write_text("a report")
    return 1  # as the real one does beside a good report, now and then


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
