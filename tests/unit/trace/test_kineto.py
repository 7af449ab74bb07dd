"""Reading Kineto traces: exact times, streaming JSON, old and new spellings, bad files, traces without a GPU."""

import gzip
import io
import json

import numpy as np
import pytest
import trace_generator as generator
from hypothesis import given
from hypothesis import strategies as st

from tunemap.errors import UserError
from tunemap.trace import kineto
from tunemap.trace.arrays import CPU_DEVICE
from tunemap.trace.categories import load_rules
from tunemap.trace.kineto import nanoseconds, read_kineto, top_level

KEEP = load_rules().keeps_range


def write(path, events, **header):
    path.write_text(json.dumps(header | {"traceEvents": events}))
    return path


def event(category, name, ts, dur, tid=1, pid=1, **args):
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "pid": pid, "tid": tid, "args": args}


@given(st.integers(0, 2**62))
def test_times_survive_to_the_nanosecond(ns):
    assert nanoseconds(f"{ns // 1000}.{ns % 1000:03d}") == ns


@pytest.mark.parametrize(
    ("text", "ns"), [("1.5", 1500), ("0.0004", 0), ("0.0005", 1), ("1e3", 1_000_000), (7, 7000), ("-1.25", -1250)]
)
def test_other_spellings_of_times(text, ns):
    assert nanoseconds(text) == ns


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    before=st.dictionaries(st.text(max_size=5).filter(lambda k: k != "traceEvents"), json_values, max_size=3),
    events=st.lists(json_values, max_size=8),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
)
def test_streaming_gives_what_json_gives_whatever_the_chunks(before, events, chunk, indent):
    text = json.dumps(before | {"traceEvents": events, "after": 12345}, indent=indent)
    original, kineto._CHUNK_CHARACTERS = kineto._CHUNK_CHARACTERS, chunk
    try:
        parsed = list(top_level(io.StringIO(text)))
    finally:
        kineto._CHUNK_CHARACTERS = original
    assert [value for key, value in parsed if key is None] == events
    assert {key: value for key, value in parsed if key is not None} == before | {"after": 12345}


def test_a_bare_list_of_events_is_a_trace():
    assert list(top_level(io.StringIO(' [ {"a": 1}, {"b": 2} ] '))) == [(None, {"a": 1}), (None, {"b": 2})]


def test_the_generator_is_read_back_exactly(tmp_path):
    (rank, *_) = generator.generate(900, processes=2, steps=2)
    path = tmp_path / "rank0.json.gz"
    generator.write_kineto(path, rank, 2)
    trace = read_kineto(path, KEEP)
    assert trace.kernels.start_ns.tolist() == rank.kernels.start.tolist()
    assert trace.kernels.end_ns.tolist() == rank.kernels.end.tolist()
    assert trace.kernels.correlation.tolist() == rank.kernels.correlation.tolist()
    assert trace.copies.bytes.tolist() == rank.copy_bytes.tolist()
    assert trace.copies.kind.tolist() == [generator.COPIES[k][0] for k in rank.copies.name]
    assert trace.copies.source_memory.tolist() == [generator.COPIES[k][1] for k in rank.copies.name]
    assert (trace.processes[0].pid, len(trace.processes)) == (rank.pid, 1)


def test_the_spelling_of_2021(tmp_path):
    events = [
        event("Operator", "ProfilerStep#1", 0, 100),
        event("Runtime", "cudaLaunchKernel", 5, 2, correlation=9),
        event("Kernel", "void gemm<float>(int)", 20, 10, tid="stream 7", pid=0, device=0, stream=7, correlation=9),
        event("Memcpy", "Memcpy HtoD (Pageable -> Device)", 40, 1, tid="stream 7", device=0, stream=7, bytes=64),
        event("Memset", "Memset (Device)", 50, 1, tid="stream 7", device=0, stream=7, bytes=4),
    ]
    trace = read_kineto(write(tmp_path / "t.json", events, schemaVersion=1), KEEP)
    assert (trace.kernels.start_ns.tolist(), trace.kernels.correlation.tolist()) == ([20_000], [9])
    assert (trace.copies.kind.tolist(), trace.copies.bytes.tolist()) == ([1, 100], [64, 4])
    assert (len(trace.calls), len(trace.ranges)) == (1, 1)


def test_an_operator_called_forward_is_no_phase_where_annotations_exist(tmp_path):
    events = [event("cpu_op", "forward", 0, 100), event("kernel", "k", 5, 2, device=0, stream=7)]
    assert len(read_kineto(write(tmp_path / "t.json", events), KEEP).ranges) == 0


def test_collectives_bring_their_bytes_and_group(tmp_path):
    meta = {"Collective name": "allreduce", "In msg nelems": 10, "Out msg nelems": 10, "dtype": "BFloat16",
            "Group size": 2, "Process Group Name": "dp", "Process Group Ranks": "[0, 1]"}  # fmt: skip
    events = [event("kernel", "ncclDevKernel_AllReduce", 0, 5, device=0, stream=7, **meta)]
    trace = read_kineto(write(tmp_path / "t.json", events, distributedInfo={"rank": 1, "world_size": 2}), KEEP)
    assert (trace.messages.in_bytes.tolist(), trace.groups[0].name, trace.groups[0].size) == ([20], "dp [0, 1]", 2)
    assert (trace.processes[0].rank, trace.processes[0].world_size) == (1, 2)


def test_events_without_a_duration_are_counted_not_guessed(tmp_path):
    broken = event("kernel", "k", 5, -2, device=0, stream=7)
    missing = event("kernel", "k", 5, 2, device=0, stream=7)
    del missing["dur"]
    good = event("kernel", "k", 5, 2, device=0, stream=7)
    trace = read_kineto(write(tmp_path / "t.json", [broken, missing, good]), KEEP)
    assert len(trace.kernels) == 1
    assert trace.notes == ("t.json: 2 events without a valid duration were left out",)


def bad_files():
    whole = json.dumps({"traceEvents": [event("kernel", "k" * 50, i, 1, device=0, stream=7) for i in range(50)]})
    yield "cut.json", whole[:2000].encode(), "truncated or damaged JSON"
    yield "cut.json.gz", gzip.compress(whole.encode())[:200], "truncated or damaged gzip"
    yield "noise.json.gz", b"\x1f\x8b" + b"\x00" * 50, "truncated or damaged gzip"
    yield "brackets.json", b'{"traceEvents": [}', "truncated or damaged JSON"
    yield "type.json", b'{"traceEvents": [{"ph": "X", "cat": 7, "name": "k"}]}', "field of the wrong type"
    yield "list.json", b'{"traceEvents": [[1, 2]]}', "field of the wrong type"
    yield "name.json", b'{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": 1, "dur": 1}]}', "has no field 'name'"
    yield "deep.json", b'{"traceEvents": [' + b"[" * 100_000, "damaged JSON"
    yield "rank.json", b'{"distributedInfo": [3], "traceEvents": []}', "field of the wrong type"
    time = json.dumps({"traceEvents": [event("kernel", "k", "soon", 1, device=0, stream=7)]})
    yield "time.json", time.encode(), "'soon' is not a time"


@pytest.mark.parametrize(("name", "data", "message"), bad_files(), ids=lambda v: v if isinstance(v, str) else "")
def test_bad_files_are_one_clear_message(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read_kineto(path, KEEP)
    assert str(error.value).startswith(str(path))


def test_bytes_that_are_not_utf8_are_replaced(tmp_path):
    path = tmp_path / "t.json"
    data = json.dumps({"traceEvents": [event("kernel", "kXk", 5, 2, device=0, stream=7)]}).encode()
    path.write_bytes(data.replace(b"kXk", b"k\xffk"))
    assert read_kineto(path, KEEP).names == ("k\ufffdk",)


# -- the CPU as the device -------------------------------------------------------------------------------------


def pieces(tmp_path, events):
    trace = read_kineto(write(tmp_path / "cpu.json", events), KEEP)
    assert (trace.kernels.device == CPU_DEVICE).all()
    k = trace.kernels
    rows = zip(k.start_ns // 1000, k.end_ns // 1000, k.name, k.counted, strict=True)
    return sorted((int(s), int(e), trace.names[n], bool(c)) for s, e, n, c in rows)


def test_operators_are_cut_to_where_they_are_innermost(tmp_path):
    events = [
        event("cpu_op", "linear", 0, 100),
        event("cpu_op", "t", 10, 5),
        event("cpu_op", "addmm", 20, 60),
        event("cpu_op", "copy", 30, 10),
        event("cpu_op", "gelu", 100, 7),
    ]
    assert pieces(tmp_path, events) == [
        (0, 10, "linear", True),
        (10, 15, "t", True),
        (15, 20, "linear", False),
        (20, 30, "addmm", True),
        (30, 40, "copy", True),
        (40, 80, "addmm", False),
        (80, 100, "linear", False),
        (100, 107, "gelu", True),
    ]


def test_an_operator_that_its_child_fills_still_counts(tmp_path):
    events = [event("cpu_op", "outer", 0, 10), event("cpu_op", "inner", 0, 10)]
    found = pieces(tmp_path, events)
    assert (0, 10, "inner", True) in found
    assert sum(counted for _, _, name, counted in found if name == "outer") == 1
    assert sum(e - s for s, e, _, _ in found) == 10


def test_copies_inside_a_gloo_range_belong_to_it(tmp_path):
    events = [
        event("user_annotation", "gloo:all_reduce", 0, 50, tid=2, **{"Input Dims": [[3, 4]], "Input type": ["float"]}),
        event("cpu_op", "aten::copy_", 10, 5, tid=2),
        event("cpu_op", "aten::mm", 0, 30, tid=1),
    ]
    assert pieces(tmp_path, events) == [(0, 30, "aten::mm", True), (0, 50, "gloo:all_reduce", True)]
    assert read_kineto(tmp_path / "cpu.json", KEEP).messages.in_bytes.tolist() == [48]


nested = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(1, 2)), min_size=1, max_size=12)


@given(nested)
def test_pieces_never_overlap_on_a_thread_and_cover_the_operators(spans):
    table = np.array([(s, s + d, t, i) for i, (s, d, t) in enumerate(spans)], np.int64).T
    kernels = kineto.cpu_kernels(np.empty((4, 0), np.int64), table)
    assert kernels.counted.sum() == len(spans)
    for thread in (1, 2):
        mine = kernels.stream == thread
        bits = np.zeros(70, int)
        for start, end in zip(kernels.start_ns[mine], kernels.end_ns[mine], strict=True):
            bits[start:end] += 1
        expected = np.zeros(70, bool)
        for start, length, t in spans:
            expected[start : start + length] |= t == thread
        assert bits.max(initial=0) <= 1
        # a child that outlasts its parent is cut to it, so the pieces cover at most the operators
        assert not (bits > expected).any()
