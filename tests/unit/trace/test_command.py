"""`tunemap facts`: what it writes, what it says, and what it must never repeat."""

import argparse
import csv
import json
import os
import sqlite3

import pytest
import trace_generator as generator

from tunemap.errors import UserError
from tunemap.trace.command import add_facts_arguments, run_facts, trace_kind

TABLES = ["kernels", "categories", "phases", "collectives", "copies", "copy_timeline", "gaps", "apis"]
FIELDS = ["window_ns", "compute_ns", "communication_ns", "overlap_ns", "exposed_communication_ns", "copy_ns",
          "exposed_copy_ns", "idle_ns", "kernel_count", "kernel_time_sum_ns", "nccl_time_sum_share", "nccl_busy_share",
          "nccl_exposed_share"]  # fmt: skip


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_facts_arguments(parser)
    return run_facts(parser.parse_args([str(a) for a in arguments]))


@pytest.fixture
def export(tmp_path):
    path = tmp_path / "report.sqlite"
    generator.write_nsys(path, generator.generate(800, processes=2, steps=3))
    return path


def test_it_writes_the_summary_and_every_table(export, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert run(export, "--out", out) == 0
    assert sorted(os.listdir(out)) == sorted(["summary.json", *(f"{name}.csv" for name in TABLES)])
    summary = json.loads((out / "summary.json").read_text())
    assert [d["pid"] for d in summary["devices"]] == [1000, 1007]
    for device in summary["devices"]:
        assert set(FIELDS) <= device.keys()
        assert (
            device["compute_ns"] + device["exposed_communication_ns"] + device["exposed_copy_ns"] + device["idle_ns"]
            == (device["window_ns"])
        )
    with (out / "phases.csv").open(newline="") as file:
        phases = list(csv.DictReader(file))
    assert sum(int(r["time_ns"]) for r in phases) == sum(d["kernel_time_sum_ns"] for d in summary["devices"])
    assert "= window" in capsys.readouterr().out


def test_parquet_holds_the_same_as_csv(export, tmp_path):
    import pyarrow.parquet

    run(export, "--out", tmp_path / "csv")
    run(export, "--out", tmp_path / "parquet", "--format", "parquet")
    for name in TABLES:
        table = pyarrow.parquet.read_table(tmp_path / "parquet" / f"{name}.parquet").to_pydict()
        with (tmp_path / "csv" / f"{name}.csv").open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        assert list(table) == reader.fieldnames
        for column, values in table.items():
            assert ["" if v is None else str(v) for v in values] == [row[column] for row in rows], (name, column)


def test_writing_again_in_another_format_leaves_no_stale_table(export, tmp_path):
    out = tmp_path / "out"
    run(export, "--out", out)
    run(export, "--out", out, "--format", "parquet")
    assert not list(out.glob("*.csv"))


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_nothing_of_the_environment_or_the_user_reaches_an_output(tmp_path, capsys, form):
    ranks = generator.generate(600, processes=2, steps=2)
    nsys, kineto = tmp_path / "r.sqlite", tmp_path / "r.json.gz"
    generator.write_nsys(nsys, ranks)
    with sqlite3.connect(nsys) as database:
        database.execute("CREATE TABLE DIAGNOSTIC_EVENT (timestamp INTEGER, severity INTEGER, text TEXT)")
        database.execute("INSERT INTO DIAGNOSTIC_EVENT VALUES (1, 2, ?)", (f"lost /home/{generator.USER}",))
    generator.write_kineto(kineto, ranks[0], 1)
    assert generator.SECRET.encode() in nsys.read_bytes()
    out = tmp_path / "out"
    run(nsys, kineto, "--out", out, "--format", form)
    shown = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in out.iterdir()) + (shown.out + shown.err).encode()
    for secret in (generator.SECRET, generator.USER, "HF_TOKEN", "/home/", str(tmp_path)):
        assert secret.encode() not in written, secret


def test_several_files_are_one_job(tmp_path):
    ranks = generator.generate(600, processes=2, steps=2, collide=True)
    paths = [tmp_path / f"rank{r.index}.json" for r in ranks]
    for path, rank in zip(paths, ranks, strict=True):
        generator.write_kineto(path, rank, 2)
    run(*paths, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(d["process"], d["trace"], d["device"]) for d in summary["devices"]] == [
        (0, "rank0.json", 0), (1, "rank1.json", 0)]  # fmt: skip


def test_compare_takes_traces_and_folders_alike(export, tmp_path, capsys):
    other = tmp_path / "other.sqlite"
    generator.write_nsys(other, generator.generate(900, processes=2, steps=3, seed=9))
    run(export, "--out", tmp_path / "a")
    run(other, "--out", tmp_path / "b", "--format", "parquet")
    capsys.readouterr()
    shown = []
    for a, b in ((export, other), (tmp_path / "a", tmp_path / "b"), (export, tmp_path / "b")):
        assert run("--compare", a, b, "--out", tmp_path / "waterfall") == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]
    summary = json.loads((tmp_path / "waterfall" / "comparison.json").read_text())
    assert summary["per_step"]
    with (tmp_path / "waterfall" / "waterfall.csv").open(newline="") as file:
        total = sum(float(row["delta_ns"]) for row in csv.DictReader(file))
    assert total == pytest.approx(summary["delta_window_ns"], abs=1e-3)


def test_a_capture_without_cuda_ends_well_and_says_why(tmp_path, capsys, shared_traces):
    trace = shared_traces / "nsys" / "cpuonly_no_cuda_tables_2023.4.sqlite"
    assert run(trace, "--out", tmp_path) == 0
    shown = capsys.readouterr()
    assert "no device work" in shown.out
    assert "no CUDA kernels, copies or memsets in this export" in shown.err
    assert json.loads((tmp_path / "summary.json").read_text())["devices"] == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.sqlite", b"", "the file is empty"),
        ("noise.sqlite", b"\x00\x01\x02" * 100, "damaged: it does not start like an SQLite file"),
        ("report.nsys-rep", b"\x00\x01\x02" * 100, "nsys export --type sqlite report.nsys-rep"),
        ("report.qdstrm", b"\x00\x01\x02" * 100, "an unfinished capture"),
        ("report.ncu-rep", b"\x00\x01\x02" * 100, "ncu --import report.ncu-rep --csv"),
        ("notes.txt", b"hello", "nsys SQLite exports and Kineto .json or .json.gz files are read"),
    ],
)
def test_what_is_no_trace_gets_a_hint(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        run(path, "--out", tmp_path / "out")
    assert str(error.value).startswith(str(path))
    assert not (tmp_path / "out").exists()


def test_content_decides_not_the_name(tmp_path, export):
    odd = tmp_path / "trace.bin"
    odd.write_bytes(export.read_bytes())
    assert trace_kind(odd) == "nsys"
    odd.write_bytes(b'\xef\xbb\xbf  {"traceEvents": []}')
    assert trace_kind(odd) == "kineto"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no trace given"),
        (["missing.sqlite", "--out", "o"], "missing.sqlite: no such file"),
        (["t.sqlite"], "--out DIR is needed"),
        (["t.sqlite", "--out", "o", "--bucket-ms", "0"], "--bucket-ms 0: allowed are numbers above 0"),
        (["t.sqlite", "--out", "o", "--bucket-ms", "nan"], "--bucket-ms nan: allowed are numbers above 0"),
        (["t.sqlite", "--out", "o", "--bucket-ms", "inf"], "--bucket-ms inf: .* up to 9,007,199,254"),
        (["t.sqlite", "--out", "o", "--bucket-ms", "1e-9"], "--bucket-ms 1e-09: less than the nanosecond"),
        (["t.sqlite", "--out", "o", "--world-size", "0"], "--world-size 0: must be at least 1"),
        (["t.sqlite", "--compare", "a", "b"], "leave out the other traces"),
        (["--compare", "a", "b", "--figures"], "--figures needs --out DIR"),
        ([".", "--out", "o"], "a folder; name the trace files in it"),
        (["--compare", ".", "."], "no summary.json in this folder"),
    ],
)
def test_wrong_arguments_are_one_clear_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(*arguments)


def test_an_output_that_cannot_be_written_is_one_clear_message(export, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"--out .*file.* cannot be created"):
        run(export, "--out", tmp_path / "file" / "out")


def test_a_trace_named_twice_is_not_two_ranks(export, tmp_path):
    with pytest.raises(UserError, match=r"report\.sqlite: named twice"):
        run(export, export, "--out", tmp_path / "out")


def test_a_damaged_summary_is_one_clear_message(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: damaged"):
        run("--compare", tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda summary: summary.pop("devices"), "no 'devices'"),
        (lambda summary: summary["devices"][0].pop("step_count"), "no 'step_count'"),
        (lambda summary: summary["devices"].clear(), "no "),  # the tables have a device that the summary has not
    ],
)
def test_facts_that_lack_what_a_comparison_reads_are_one_clear_message(export, tmp_path, change, missing):
    out = tmp_path / "out"
    run(export, "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    change(summary)
    (out / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=rf"out: damaged \({missing}"):
        run("--compare", out, out)


def test_a_table_cut_anywhere_is_damaged_or_ends_with_a_row(export, tmp_path):
    out = tmp_path / "out"
    run(export, "--out", out)
    whole = (out / "phases.csv").read_bytes()
    lines = whole.splitlines(keepends=True)
    for end in {0, 5, *range(len(whole) - len(lines[-1]) + 1, len(whole))}:
        (out / "phases.csv").write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"phases\.csv: damaged \(a line is cut\)"):
            run("--compare", out, out)
    (out / "phases.csv").write_bytes(whole + b"1,2\n")
    with pytest.raises(UserError, match=r"phases\.csv: damaged"):
        run("--compare", out, out)


def test_planning_and_help_import_no_heavy_module():
    import subprocess
    import sys

    heavy = ("numpy", "pandas", "torch", "matplotlib")
    code = f"import sys, tunemap.trace.command; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
