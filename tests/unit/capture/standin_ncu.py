"""A stand-in for ncu, which is not installed where tests run: notes its arguments and prints a made raw page.

Files beside it tell it what to do: counters is what it knows, page.csv what a report prints; arguments.json gets
every call.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CALLS = HERE / "arguments.json"


def install(folder: Path, counters: list[str], page: str) -> Path:
    """Put an executable `ncu` in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "counters").write_text("".join(f"{name}    Counter    byte    what it counts\n" for name in counters))
    (folder / "page.csv").write_text(page)
    ncu = folder / "ncu"
    ncu.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
    ncu.chmod(0o755)
    return folder


def main(words: list[str]) -> int:
    """Do what ncu would do."""
    known = json.loads(CALLS.read_text()) if CALLS.exists() else []
    CALLS.write_text(json.dumps([*known, words]))
    if words == ["--version"]:
        print("NVIDIA (R) Nsight Compute Command Line Profiler\nVersion 2024.1.1.0 (stand-in)")
        return 0
    if words == ["--query-metrics"]:
        print("Device NVIDIA H100 (GH100)\nMetric Name    Metric Type    Metric Unit    Metric Description")
        print((HERE / "counters").read_text())
        return 0
    options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    if "--import" in options:
        print((HERE / "page.csv").read_text(), end="")
        return 0
    program = next(index for index, word in enumerate(words) if not word.startswith("--"))
    print("==PROF== Connected to process 7")
    subprocess.run(words[program:], check=False)
    Path(options["--export"] + ".ncu-rep").write_text("a report, with the environment of the process")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
