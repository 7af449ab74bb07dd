"""The artifact of a study: one archive with which a reviewer checks the numbers, or makes them again.

    STUDY-artifact/README.md                  claims, the command that checks each, what to expect, time and hardware
    STUDY-artifact/SHA256SUMS                 of every other file; `tunemap verify` reads it
    STUDY-artifact/ro-crate-metadata.json     what is in it, for machines (https://w3id.org/ro/crate)
    STUDY-artifact/environment.txt            every package that was installed where it was packed
    STUDY-artifact/requirements-verify.txt    the few that checking needs; no torch
    STUDY-artifact/src, workflow, config ...  the checkout
    STUDY-artifact/results, logs              results
    STUDY-artifact/.snakemake                 Snakemake's records, so that it knows what is up to date

Times of modification are kept, because Snakemake compares them. Models, weights and traces go
along while they are small: then Snakemake finds nothing to do in the unpacked archive.
"""

from __future__ import annotations

import io
import json
import mimetypes
import shlex
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import jinja2
import yaml

from tunemap.collect import read_tables
from tunemap.errors import UserError
from tunemap.files import read_json, sha256_of, write_atomic_chunks
from tunemap.report import words
from tunemap.report.cards import DEFAULT_STUDY
from tunemap.report.formats import records
from tunemap.verify import CHECKSUMS

CHECKOUT = (
    *("Snakefile", "Makefile", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "requirements.lock"),
    *("config", "docs", "envs", "profiles", "resources", "src", "workflow", "slurm", "results/README.md"),
)
SNAKEMAKE = (".snakemake/metadata", ".snakemake/tunemap")
LEFT_OUT = ("__pycache__",)
HEAVY_BYTES = 200 * 2**20  # models, tokens, weights and traces go along up to this size, all together
VERIFY_EXTRAS = ("rich",)  # what the command line needs besides the report's environment


@dataclass(frozen=True)
class Claim:
    """A sentence of the report with the points that it rests on."""

    experiment: str
    sentence: str


def pack(checkout: Path, plan_path: Path, results_dir: Path, output: Path, *, study_file: str) -> None:
    """Write the archive. `checkout` holds Snakefile and src, `results_dir` is CHECKOUT/results/STUDY.

    Raises UserError where the results are not complete.
    """
    plan = read_json(plan_path)
    root = f"{plan['study']}-artifact"
    files = dict(_files(checkout, results_dir, output, Path(study_file)))
    heavy = _heavy(checkout, results_dir)
    with_heavy = sum(path.stat().st_size for path in heavy.values()) <= HEAVY_BYTES
    files |= heavy if with_heavy else {}
    texts = {
        "README.md": _readme(plan, results_dir, study_file, with_heavy),
        "environment.txt": "".join(f"{line}\n" for line in sorted(_installed(), key=str.lower)),
        "requirements-verify.txt": "".join(f"{line}\n" for line in _verify_requirements(checkout)),
    }
    files = {name: path for name, path in files.items() if name not in texts}
    texts["ro-crate-metadata.json"] = _crate(plan, files, texts)
    sums = {name: sha256_of(path) for name, path in files.items()}
    texts[CHECKSUMS] = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    newest = max(path.stat().st_mtime for path in files.values())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        for name, text in sorted(texts.items()):
            entry = tarfile.TarInfo(f"{root}/{name}")
            entry.size, entry.mtime, entry.mode = len(text.encode()), newest, 0o644
            archive.addfile(entry, io.BytesIO(text.encode()))
        for name, path in sorted(files.items()):
            archive.add(path, f"{root}/{name}", recursive=False, filter=_anonymous)
        link = checkout / "slurm"
        if link.is_symlink():
            archive.add(link, f"{root}/slurm", recursive=False, filter=_anonymous)
    write_atomic_chunks(output, [buffer.getvalue()])


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nobody's name and group in the archive."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


# --- what goes in -----------------------------------------------------------------------------------------


def _files(checkout: Path, results_dir: Path, output: Path, study_file: Path) -> Iterator[tuple[str, Path]]:
    """(name in the archive, file), everything but what is heavy."""
    study = results_dir.name
    for part in (*CHECKOUT, *SNAKEMAKE, f"logs/{study}"):
        yield from _below(checkout, checkout / part)
    if (checkout / study_file).is_file():
        yield study_place(study_file.as_posix()), checkout / study_file
    if not (results_dir / "plan.json").is_file():
        raise UserError(f"{results_dir}: no plan.json; run the workflow first")
    for name, path in _below(checkout, results_dir):
        parts = Path(name).parts[2:]
        is_heavy = parts[0] in ("captures", "unfinished") or "weights" in parts
        if not is_heavy and path.resolve() != output.resolve() and not path.name.startswith("artifact."):
            yield name, path


def study_place(study_file: str) -> str:
    """Where a study's file lies in the archive: where it lay in the checkout, or with the studies."""
    path = Path(study_file)
    outside = path.is_absolute() or ".." in path.parts
    return f"config/studies/{path.name}" if outside else path.as_posix()


def _heavy(checkout: Path, results_dir: Path) -> dict[str, Path]:
    """Models, data and weights, which only training again needs, and traces, which only extracting again needs."""
    found = dict(_below(checkout, results_dir.parent / "shared")) | dict(_below(checkout, results_dir / "captures"))
    for folder in sorted((results_dir / "runs").glob("*/weights")):
        found |= dict(_below(checkout, folder))
    return found


def _below(checkout: Path, part: Path) -> Iterator[tuple[str, Path]]:
    if part.is_symlink():
        return
    for path in sorted(part.rglob("*")) if part.is_dir() else [part] if part.is_file() else []:
        left_out = any(step in LEFT_OUT or step.endswith(".egg-info") for step in path.parts)
        if path.is_file() and not path.is_symlink() and not left_out:
            yield path.relative_to(checkout).as_posix(), path


def _installed() -> list[str]:
    return [f"{found.metadata['Name']}=={found.version}" for found in distributions() if found.metadata["Name"]]


def _verify_requirements(checkout: Path) -> list[str]:
    """The pins of envs/report.yaml, and of the lock file what the command line needs besides."""
    pins = yaml.safe_load((checkout / "envs/report.yaml").read_text())["dependencies"][-1]["pip"]
    locked = (checkout / "requirements.lock").read_text().splitlines()
    return [*pins, *(line for line in locked if line.partition("==")[0] in VERIFY_EXTRAS)]


# --- what describes it ------------------------------------------------------------------------------------


def _crate(plan: dict[str, Any], files: dict[str, Path], texts: dict[str, str]) -> str:
    """ro-crate-metadata.json."""
    from rocrate.rocrate import ROCrate  # half a second, which only packing needs

    crate = ROCrate()
    crate.name = plan["report"].get("title") or plan["study"]
    crate.description = plan["report"].get("introduction") or f"Artifact of the study {plan['study']}."
    for name, path in files.items():
        if name.startswith(("src/", "workflow/", ".snakemake/", "docs/", "resources/")):
            continue  # named by their folders below
        properties = {"name": name, "contentSize": str(path.stat().st_size)}
        kind = mimetypes.guess_type(name)[0]
        crate.add_file(path, name, properties=properties | ({"encodingFormat": kind} if kind else {}))
    for name in texts:
        crate.add_file(io.StringIO(""), name, properties={"name": name})
    for folder in ("src", "workflow", ".snakemake", "docs", "resources"):
        crate.add_dataset(dest_path=f"{folder}/", properties={"name": folder})
    return json.dumps(crate.metadata.generate(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _readme(plan: dict[str, Any], results_dir: Path, study_file: str, with_heavy: bool) -> str:
    """README.md of the archive: from claims to commands."""
    tables = read_tables(results_dir / "tables")
    runs, points, comparisons = records(tables.runs), records(tables.points), records(tables.comparisons)
    claims = []
    for experiment in plan["experiments"]:
        trained = {(row["experiment"], row["point"]) for row in points if row["method_kind"] != "base"}
        rows = [row for row in comparisons if row["experiment"] == experiment["name"]]
        rows = [row for row in rows if (row["experiment"], row["point"]) in trained]
        claims.append(Claim(experiment["name"], words.section_answer(rows)))
    measured = [run for run in runs if run["wall_time_s"] is not None]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    given = study_place(study_file)
    return environment.get_template("artifact.md.j2").render(
        title=plan["report"].get("title") or plan["study"],
        study=plan["study"],
        claims=claims,
        configfile="" if given == DEFAULT_STUDY else f" --configfile {shlex.quote(given)}",
        runs=len(runs),
        devices=", ".join(dict.fromkeys(point["device"] for point in points if point["device"])) or "unknown",
        hours=sum(run["wall_time_s"] for run in measured) / 3600,
        evaluation_hours=sum(run["evaluation_time_s"] or 0 for run in runs) / 3600,
        peak_mib=max((run["peak_allocated_bytes"] or 0 for run in runs), default=0) / 2**20,
        with_heavy=with_heavy,
        heavy_mib=HEAVY_BYTES // 2**20,
    )
