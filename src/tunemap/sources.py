"""Which source files a command line uses: the script, every module of this package that it leads to, and their data.

A stage of the workflow has their digest among its parameters, so that editing the trainer retrains and editing the
report does not. Found by reading import statements, without importing anything.

A workflow reads them once. Its jobs, each of which parses the workflow anew on a cluster, are told what it found.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator, MutableMapping
from functools import cache
from pathlib import Path

PACKAGE = "tunemap"
VARIABLE = "TUNEMAP_SOURCE_DIGESTS"  # by script, from a workflow to what it spawns
PACKAGE_ROOT = Path(__file__).resolve().parent
MODULE_NAME = re.compile(rf"{PACKAGE}(\.\w+)+")
MAY_START_A_MODULE = re.compile(rf"[\"']{MODULE_NAME.pattern}[\"']")
DATA_SUFFIXES = (".yaml", ".j2", ".css", ".js", ".mplstyle", ".txt")


def sources(script: Path) -> list[Path]:
    """`script` first, then the package's files that it imports, directly or not, in a fixed order.

    Imports inside functions count. Data files of a folder belong to the modules of that folder.
    """
    seen: set[Path] = set()
    waiting = [*_imported_files(script, None)]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        waiting += _imported_files(file, _module_of(file))
    data = [
        path
        for folder in sorted({file.parent for file in seen})
        for path in sorted(folder.iterdir())
        if path.suffix in DATA_SUFFIXES
    ]
    return [script, *sorted(seen), *data]


def digest(script: Path) -> str:
    """SHA-256 over the names and contents of `sources(script)`."""
    found = hashlib.sha256()
    for path in sources(script):
        name = path.relative_to(PACKAGE_ROOT) if path.is_relative_to(PACKAGE_ROOT) else path.name
        found.update(f"{name}\0{_digest_of(path)}\0".encode())
    return found.hexdigest()


def planned_digest(script: Path, environment: MutableMapping[str, str]) -> str:
    """`digest(script)` when the workflow was planned, which is remembered in `environment` for spawned jobs."""
    known = json.loads(environment.get(VARIABLE, "{}"))
    if script.name not in known:
        known[script.name] = digest(script)
        environment[VARIABLE] = json.dumps(known)
    return str(known[script.name])


@cache
def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _imported_files(file: Path, module: str | None) -> tuple[Path, ...]:
    """Files of this package that a file imports by itself."""
    names = dict.fromkeys(part for name in _imports(file, module) for part in _with_parents(name))
    return tuple(found for name in names if (found := _file_of(name)) is not None)


def _imports(file: Path, module: str | None) -> list[str]:
    """Names of this package that a file imports; `from a import b` counts as both a and a.b."""
    text = file.read_text(encoding="utf-8")
    names: list[str] = []
    # Expressions are nine nodes of ten, and each start of Snakemake asks about every file: look at them only where
    # they may hold a module that is started by its name, as in python -m tunemap.training.worker.
    tree = ast.parse(text, filename=str(file))
    for node in ast.walk(tree) if MAY_START_A_MODULE.search(text) else _statements(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                assert module is not None
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            names.append(node.value)
    return [name for name in names if name == PACKAGE or name.startswith(f"{PACKAGE}.")]


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement below a node, in no particular order."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting += getattr(node, field, ())
        yield node


def _with_parents(name: str) -> list[str]:
    """Importing a.b.c runs a and a.b too."""
    steps = name.split(".")
    return [".".join(steps[:count]) for count in range(1, len(steps) + 1)]


def _file_of(name: str) -> Path | None:
    path = PACKAGE_ROOT.joinpath(*name.split(".")[1:])
    if (path / "__init__.py").is_file():
        return path / "__init__.py"
    file = path.with_suffix(".py")
    return file if file.is_file() else None


def _module_of(file: Path) -> str:
    steps = file.relative_to(PACKAGE_ROOT).with_suffix("").parts
    return ".".join([PACKAGE, *(steps[:-1] if steps[-1] == "__init__" else steps)])
