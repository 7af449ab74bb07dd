"""Put first on PYTHONPATH: each Python process says at its end which source files of the package it imported."""

import atexit
import json
import os
import sys
from pathlib import Path

_folder = os.environ.get("TUNEMAP_RECORD_MODULES")


def _record() -> None:
    files = [
        getattr(module, "__file__", None)
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "tunemap"
    ]
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main and any(files):
        Path(_folder, f"{os.getpid()}.json").write_text(json.dumps({"main": main, "files": [f for f in files if f]}))


if _folder:
    atexit.register(_record)
    _exit = os._exit

    def _recorded_exit(code: int) -> None:
        _record()
        _exit(code)

    os._exit = _recorded_exit
