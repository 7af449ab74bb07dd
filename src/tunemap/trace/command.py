"""`tunemap facts TRACE … --out DIR` and `tunemap facts --compare A B`: facts of any trace, from anyone's run."""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from tunemap.errors import UserError, refuse_outside
from tunemap.files import naming

SUMMARY = "summary.json"
FORMATS = ("csv", "parquet")
LONGEST_NS = 2**53  # 104 days: doubles hold every integer up to here
LARGEST_BYTES = 2**53

_SIGNATURES = {
    b"SQLite format 3\x00": "nsys",
    b"\x1f\x8b": "kineto",
}


def add_facts_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tunemap facts`."""
    parser.add_argument(
        "traces",
        nargs="*",
        type=Path,
        metavar="TRACE",
        help="nsys SQLite exports and Kineto traces (.json, .json.gz); several files of one job are analysed together",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for what is written; needed unless two runs are only compared"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="explain the difference of two runs; each is a trace, or a folder that --out wrote",
    )
    parser.add_argument(
        "--window",
        choices=("gpu", "steps"),
        default="gpu",
        help="from the first to the last device work (default), or the annotated training steps only",
    )
    parser.add_argument(
        "--bucket-ms", type=float, default=100.0, metavar="MS", help="resolution of copy_timeline (default: 100)"
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks of the job, for traces that do not say it (nsys)"
    )
    parser.add_argument("--format", choices=FORMATS, default="csv", help="format of the tables (default: csv)")
    parser.add_argument(
        "--ncu", nargs="+", type=Path, default=[], metavar="CSV", help="Nsight Compute CSV exports, for roofline points"
    )
    parser.add_argument("--figures", action="store_true", help="also draw the figures, as SVG")


def run_facts(args: argparse.Namespace) -> int:
    """Run `tunemap facts`; raises `UserError` with one clear message for anything the user can fix."""
    from tunemap.trace.compare import compare_facts
    from tunemap.trace.facts import FactOptions

    refuse_outside("--bucket-ms", args.bucket_ms, LONGEST_NS // 1_000_000)
    if round(args.bucket_ms * 1e6) < 1:
        raise UserError(f"--bucket-ms {args.bucket_ms:g}: less than the nanosecond that traces count in")
    if args.world_size is not None and args.world_size < 1:
        raise UserError(f"--world-size {args.world_size}: must be at least 1")
    options = FactOptions(round(args.bucket_ms * 1e6), args.window, args.world_size)
    if args.compare:
        if args.traces:
            raise UserError("--compare takes its two runs itself; leave out the other traces")
        if args.figures and not args.out:
            raise UserError("--figures needs --out DIR: the folder to draw in")
        first, second = (load_run(path, options) for path in args.compare)
        comparison = compare_facts(first, second)
        for line in comparison.lines():
            print(line)
        if args.out:
            write_tables(args.out, {"waterfall": comparison.table}, args.format)
            write_json(args.out / "comparison.json", comparison.summary)
            if args.figures:
                from tunemap.trace.figures import draw_waterfall

                draw_waterfall(comparison, args.out)
        return 0
    if not args.traces and not args.ncu:
        raise UserError("no trace given: name nsys SQLite exports or Kineto .json(.gz) files, or use --compare A B")
    if not args.out:
        raise UserError("--out DIR is needed: the folder for summary.json and the tables")
    if args.traces:
        from tunemap.trace.facts import compute_facts

        trace = read_traces(args.traces)
        facts = compute_facts(trace, options=options)
        write_tables(args.out, facts.tables, args.format)
        write_json(args.out / SUMMARY, facts.summary)
        for note in facts.summary["notes"]:
            print(f"note: {note}", file=sys.stderr)
        for line in summary_lines(facts.summary):
            print(line)
        if args.figures:
            from tunemap.trace.figures import draw_facts

            draw_facts(facts, trace, args.out)
    if args.ncu:
        from tunemap.trace.ncu import read_ncu

        points = read_ncu(args.ncu)
        write_tables(args.out, {"roofline": points}, args.format)
        if args.figures:
            from tunemap.trace.figures import draw_roofline

            draw_roofline(points, args.out)
    return 0


# -- reading ---------------------------------------------------------------------------------------------------


def read_traces(paths: list[Path]) -> Any:
    """Read files of either kind, told apart by content, into one `Trace`."""
    from tunemap.trace.arrays import merge_traces
    from tunemap.trace.categories import load_rules
    from tunemap.trace.clocks import on_one_clock

    twice = [path for i, path in enumerate(paths) if path in paths[:i]]
    if twice:
        raise UserError(f"{twice[0]}: named twice")
    rules = load_rules()
    traces = [_reader(trace_kind(path))(path, rules.keeps_range) for path in paths]
    for path, trace in zip(paths, traces, strict=True):
        _refuse_nonsense(path, trace)
    return merge_traces(on_one_clock(traces, rules))


def _refuse_nonsense(path: Path, trace: Any) -> None:
    """Raise `UserError` for values that no profiler writes and that sums would overflow on."""
    names = [repr(name)[:80] for name in trace.names if type(name) is not str]
    problem = f"an event is called {names[0]}, which is no text" if names else ""
    timed = [rows for rows in (trace.kernels, trace.copies, trace.calls, trace.ranges) if len(rows)]
    if timed:
        first, last = min(int(rows.start_ns.min()) for rows in timed), max(int(rows.end_ns.max()) for rows in timed)
        if last - first > LONGEST_NS:
            problem = f"its times span {last - first} ns, more than {LONGEST_NS / 86_400e9:.0f} days"
    messages = (trace.messages.in_bytes, trace.messages.out_bytes)
    for name, sizes in (("copy", trace.copies.bytes), *(("message", sizes) for sizes in messages)):
        if len(sizes) and not -1 <= int(sizes.min()) <= int(sizes.max()) <= LARGEST_BYTES:
            problem = f"the size of a {name} is {sizes.min()} to {sizes.max()} bytes"
    if problem:
        raise UserError(f"{path}: {problem}: the file is damaged; export or write the trace again")


def _reader(kind: str) -> Any:
    if kind == "nsys":
        from tunemap.trace.nsys import read_nsys

        return read_nsys
    from tunemap.trace.kineto import read_kineto

    return read_kineto


def trace_kind(path: Path) -> str:
    """`nsys` or `kineto`, by the first bytes of the file; `UserError` for anything else."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; name the trace files in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not head:
        raise UserError(f"{path}: the file is empty (0 bytes)")
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return kind
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return "kineto"
    hints = {
        ".nsys-rep": f"export it first: nsys export --type sqlite {path.name}",
        ".qdrep": f"export it first: nsys export --type sqlite {path.name}",
        ".qdstrm": "an unfinished capture; import it with QdstrmImporter, then: nsys export --type sqlite",
        ".ncu-rep": f"a Nsight Compute report; ncu --import {path.name} --csv --page raw, then --ncu CSV",
        ".sqlite": "damaged: it does not start like an SQLite file; export the .nsys-rep again",
    }
    hint = hints.get(path.suffix.lower(), "nsys SQLite exports and Kineto .json or .json.gz files are read")
    raise UserError(f"{path}: not a trace: {hint}")


def load_run(path: Path, options: Any) -> Any:
    """Facts of a trace, or those that an earlier call wrote to a folder."""
    from tunemap.trace.compare import check_comparable
    from tunemap.trace.facts import Facts, compute_facts

    if not path.is_dir():
        return compute_facts(read_traces([path]), options=options)
    file = path / SUMMARY
    if not file.is_file():
        raise UserError(f"{path}: no {SUMMARY} in this folder; write one with: tunemap facts TRACE --out {path}")
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: damaged ({error}); write it again with tunemap facts") from None
    facts = Facts(summary, {name: read_table(path, name) for name in ("phases", "copies", "gaps")})
    with naming(path):
        check_comparable(facts)
    return facts


def read_table(folder: Path, name: str) -> dict[str, list[Any]]:
    """A table that `write_tables` wrote, with whole numbers as int and empty cells as None."""
    import csv

    if (folder / f"{name}.parquet").is_file():
        import pyarrow.parquet  # type: ignore[import-untyped]

        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pydict()
        return columns
    file = folder / f"{name}.csv"
    try:
        text = file.read_text(encoding="utf-8")
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no {name}.csv or {name}.parquet; write it with: tunemap facts TRACE --out"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: damaged ({error}); write it again with tunemap facts") from None
    # A number that was cut is a number: only the end of the last line says that nothing is missing.
    if not text.endswith("\n") or any(len(row) != len(rows[0]) for row in rows):
        raise UserError(f"{file}: damaged (a line is cut); write it again with tunemap facts")
    return {column: [_value(row[place]) for row in rows[1:]] for place, column in enumerate(rows[0])}


def _value(text: str) -> Any:
    if text == "":
        return None
    try:
        return int(text)
    except ValueError:
        return text


# -- writing ---------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write atomically, so that a reader never sees half a file."""
    _replace(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def write_tables(folder: Path, tables: dict[str, dict[str, list[Any]]], form: str) -> None:
    """Write each table as NAME.csv or NAME.parquet."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be created ({error.strerror})") from None
    for name, table in tables.items():
        path = folder / f"{name}.{form}"
        _replace(path, lambda temporary, t=table: _write_table(temporary, t, form))
        for other in FORMATS:
            if other != form:
                (folder / f"{name}.{other}").unlink(missing_ok=True)


def _write_table(path: Path, table: dict[str, list[Any]], form: str) -> None:
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        columns = {key: [str(v) for v in values] if key == "device" else values for key, values in table.items()}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """What the terminal shows: the partition of each device in percent of its window."""
    if not summary["devices"]:
        return ["no device work in these traces"]
    parts = ("compute_ns", "exposed_communication_ns", "exposed_copy_ns", "idle_ns")
    head = ("window ms", "compute", "comm", "copies", "idle")
    lines = [f"{'process':>7} {'pid':>8} {'device':>6} {head[0]:>12} " + " ".join(f"{h:>8}" for h in head[1:])]
    for device in summary["devices"]:
        window = device["window_ns"]
        shares = " ".join(f"{device[p] / window:8.1%}" if window else f"{'-':>8}" for p in parts)
        lines.append(f"{device['process']:>7} {device['pid']:>8} {device['device']:>6} {window / 1e6:>12.3f} {shares}")
    lines.append("compute + exposed communication + exposed copies + idle = window")
    return lines
