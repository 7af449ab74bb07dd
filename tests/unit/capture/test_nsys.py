"""The nsys of a capture: which options it is given, where it stands, and what is left of its export."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tunemap.capture import nsys
from tunemap.capture.launch import chosen_backend
from tunemap.trace.command import read_traces
from tunemap.trace.facts import compute_facts


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, loaded)  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


HERE = Path(__file__).parent
standin = module(HERE / "standin.py")
trace_generator = module(HERE.parent / "trace" / "trace_generator.py")


@pytest.fixture
def export(tmp_path):
    """What nsys exports of two processes, with environment and user name in it."""
    trace_generator.write_nsys(tmp_path / "made.sqlite", trace_generator.generate(2000, processes=2, steps=2))
    return tmp_path / "made.sqlite"


@pytest.fixture
def install(tmp_path, export, monkeypatch):
    def install(**helps):
        folder = standin.install(tmp_path / "bin", export, **helps)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return install


def test_options_that_this_nsys_knows_are_given_and_the_others_named(install):
    install()
    tool = nsys.probe()
    assert "--trace=cuda,nvtx,cublas,cudnn" in tool.profile_options
    assert {"--capture-range=cudaProfilerApi", "--capture-range-end=stop"} < {*tool.profile_options}
    assert (tool.dropped, "2023.4.4" in tool.version) == ((), True)
    install(profile=standin.HELP["profile"].replace("--cuda-graph-trace=", "").replace("'cudnn', ", ""),
            export="--type= --output= --force-overwrite= --lazy=")  # fmt: skip
    older = nsys.probe()
    assert older.dropped == ("--cuda-graph-trace", "--include-blobs", "--trace=cudnn")
    assert not [word for word in (*older.profile_options, *older.export_options) if "graph" in word or "blobs" in word]
    assert "--capture-range=cudaProfilerApi" in older.profile_options  # not taken for --capture-range-end


def test_an_nsys_that_cannot_capture_a_window_is_refused(install):
    install(profile=standin.HELP["profile"].replace("--capture-range-end=", ""))
    with pytest.raises(nsys.NsysError, match="does not know --capture-range-end; use a newer one, or profile torch"):
        nsys.probe()


def test_without_nsys_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not nsys.installed()
    with pytest.raises(nsys.NsysError, match="no nsys on the PATH; install it, or use torch or auto"):
        nsys.probe()


def test_backend_is_nsys_only_where_it_can_record(install, monkeypatch, tmp_path):
    install()
    assert [chosen_backend("auto", device) for device in ("cpu", "cuda")] == ["torch", "nsys"]
    assert chosen_backend("torch", "cuda") == "torch"
    with pytest.raises(nsys.NsysError, match="this run is on a CPU"):
        chosen_backend("nsys", "cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chosen_backend("auto", "cuda") == "torch"


def test_one_nsys_stands_around_the_processes_of_each_node(install, tmp_path):
    install()
    tool = nsys.probe()
    command = tool.around(["srun", "--ntasks=2", sys.executable, "-m", "torchrun", "worker"], tmp_path)
    assert command[:5] == ["srun", "--ntasks=2", tool.executable, "profile", f"--output={tmp_path}/nsys.%h"]
    assert command[-4:] == [sys.executable, "-m", "torchrun", "worker"]


def test_export_keeps_the_facts_and_no_environment(install, export, tmp_path):
    install()
    before = compute_facts(read_traces([export]))
    (tmp_path / "nsys.host.example.nsys-rep").write_text("a report")
    (made,) = nsys.probe().export(tmp_path)
    assert made.name == "trace.host.example.sqlite"
    assert not list(tmp_path.glob("*.nsys-rep"))
    secrets = (trace_generator.SECRET, trace_generator.USER)
    assert all(secret.encode() in export.read_bytes() for secret in secrets)  # else it shows nothing
    assert not any(secret.encode() in made.read_bytes() for secret in secrets)
    after = compute_facts(read_traces([made]))
    assert after.tables == before.tables
    named = [[device | {"trace": made.name} for device in facts.summary["devices"]] for facts in (before, after)]
    assert named[0] == named[1]


@pytest.mark.parametrize(("left", "message"), [("nsys.host.qdstrm", "only nsys.host.qdstrm"), (None, "only nothing")])
def test_a_capture_without_a_report_has_failed_whatever_nsys_returned(install, tmp_path, left, message):
    install()
    if left:
        (tmp_path / left).touch()
    with pytest.raises(nsys.NsysError, match=f"nsys left no report, {message}: was its importer installed"):
        nsys.probe().export(tmp_path)
