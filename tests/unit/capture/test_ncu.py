"""The ncu of a capture: what it is asked for, what is kept of its report, and the facts that come of it."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunemap.capture import ncu
from tunemap.capture.extract import extract
from tunemap.capture.launch import chosen_backend
from tunemap.trace.counters import METRICS
from tunemap.trace.ncu import read_ncu

SPEC = importlib.util.spec_from_file_location("standin_ncu", Path(__file__).with_name("standin_ncu.py"))
standin = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(standin)
TENSOR = "sm__ops_path_tensor_src_bf16_dst_fp32"
COUNTERS = [*(name.partition(".")[0] for name in METRICS), TENSOR, f"{TENSOR}_sparsity_off", "sm__cycles_active"]
PAGE = """==PROF== a line of ncu's own
"ID","Process ID","Process Name","Host Name","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum",\
"gpu__time_duration.sum","sm__ops_path_tensor_src_bf16_dst_fp32.sum"
"","","","","","byte","byte","ns",""
"0","7","python-of-alice","host-of-alice","sm80_xmma_gemm_bf16","2,000,000","1,000,000","20,000","4,294,967,296"
"1","7","python-of-alice","host-of-alice","void elementwise_kernel(int, ""T"")","4096","4096","2000","0"
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    def install(counters=COUNTERS, page=PAGE):
        monkeypatch.setenv("PATH", str(standin.install(tmp_path / "bin", counters, page)))
        return tmp_path / "bin"

    return install


def test_counters_of_this_gpu_are_asked_for_and_no_kernel_of_nccl(install, tmp_path):
    install()
    tool = ncu.probe()
    assert tool.metrics == (*METRICS, f"{TENSOR}.sum")
    assert (tool.dropped, "2024.1.1" in tool.version) == ((), True)
    command = tool.around(["python", "worker"], tmp_path)
    assert {"--profile-from-start=off", "--kernel-name=regex:^(?!nccl)", "--clock-control=none"} < {*command}
    assert command[-2:] == ["python", "worker"]
    install(counters=["gpu__time_duration", "dram__bytes_read"])
    older = ncu.probe()
    assert older.metrics == ("gpu__time_duration.sum", "dram__bytes_read.sum")
    assert older.dropped == METRICS[2:]


def test_without_ncu_or_a_gpu_the_message_says_so(install, monkeypatch, tmp_path):
    install(counters=[])
    with pytest.raises(ncu.NcuError, match="ncu knows no counters here: is there a GPU"):
        ncu.probe()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ncu.NcuError, match="there is no ncu on the PATH"):
        ncu.probe()
    with pytest.raises(ncu.NcuError, match="this run is on a CPU"):
        chosen_backend("ncu", "cpu")


def test_a_capture_leaves_kernels_without_names_of_host_and_process(install, tmp_path):
    install()
    folder = tmp_path / "capture"
    folder.mkdir()
    tool = ncu.probe()
    subprocess.run(tool.around([sys.executable, "-c", "print('hello')"], folder), check=True)
    (made,) = tool.export(folder)
    assert [path.name for path in folder.iterdir()] == [ncu.KERNELS]
    assert "alice" not in made.read_text()
    table = read_ncu([made])
    assert table["short_name"] == ["sm80_xmma_gemm_bf16", "elementwise_kernel"]
    assert table["bytes"] == [3_000_000, 8192]
    assert table["flops"] == [2**32, None]


def test_facts_get_the_points_and_the_roof_or_the_reason(install, tmp_path):
    install()
    roofline, capture = tmp_path / "rooflines", tmp_path / "captures"
    for folder in (roofline, capture):
        folder.mkdir()
    (capture / "capture.json").write_text(json.dumps({"outcome": "error", "reason": "no profiler"}))
    (roofline / "ncu.ncu-rep").write_text("a report")
    ncu.probe().export(roofline)
    described = {"outcome": "ok", "reason": None, "device_name": "NVIDIA H100 80GB HBM3", "precision": "bf16"}
    (roofline / "capture.json").write_text(json.dumps(described))
    extract(capture, tmp_path / "facts", roofline=roofline)
    with (tmp_path / "facts" / "roofline.csv").open() as file:
        points = list(csv.DictReader(file))
    assert [point["category"] for point in points] == ["gemm", "elementwise"]
    said = json.loads((tmp_path / "facts" / "roofline.json").read_text())
    assert said["bandwidth_bytes_per_s"] == pytest.approx(3.35e12, rel=0.01)
    assert said["peak_flops_per_s"] == pytest.approx(989e12, rel=0.01)
    (roofline / "capture.json").write_text(json.dumps(described | {"outcome": "error", "reason": "ERR_NVGPUCTRPERM"}))
    extract(capture, tmp_path / "facts", roofline=roofline)
    assert not (tmp_path / "facts" / "roofline.csv").exists()
    assert json.loads((tmp_path / "facts" / "roofline.json").read_text())["reason"] == "ERR_NVGPUCTRPERM"


def test_no_report_and_an_empty_one_are_failures(install, tmp_path):
    folder = install()
    with pytest.raises(ncu.NcuError, match="left no report: it may not be allowed to read counters"):
        ncu.probe().export(tmp_path)
    (folder / "page.csv").write_text("==ERROR== The report holds no kernels\n")
    (tmp_path / "ncu.ncu-rep").write_text("a report")
    with pytest.raises(ncu.NcuError, match="printed no kernels of its report: ==ERROR== The report holds no kernels"):
        ncu.probe().export(tmp_path)
