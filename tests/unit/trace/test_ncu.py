"""Roofline points from Nsight Compute CSV."""

import argparse
import csv

import pytest
from test_real_traces import rows

from tunemap.errors import UserError
from tunemap.trace.command import add_facts_arguments, run_facts
from tunemap.trace.counters import tensor_counters
from tunemap.trace.figures import draw_roofline
from tunemap.trace.ncu import read_ncu

HEADER = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'


def test_real_points(shared_traces):
    folder = shared_traces / "ncu"
    table = read_ncu([folder / "llm_kernel_0003_details.csv", folder / "copy_blocked_details.csv"])
    gemm, copy = rows(table)
    assert (gemm["time_ns"], gemm["bytes"], gemm["flops"], gemm["flops_counted"]) == (
        23_420,
        3_350_000,
        1_275_068_416,
        "tensor",
    )
    assert gemm["flops_per_byte"] == 1_275_068_416 / 3_350_000
    assert gemm["flops_per_s"] == pytest.approx(1_275_068_416 / 23.42e-6)
    assert (copy["time_ns"], copy["bytes"], copy["flops"]) == (21_058_944, None, None)


def test_the_two_pages_of_one_kernel_agree(shared_traces):
    for number in range(1, 7):
        pages = [shared_traces / "ncu" / f"llm_kernel_000{number}_{page}.csv" for page in ("details", "metrics")]
        a, b = rows(read_ncu(pages))
        assert a | {"report": None} == b | {"report": None}


def test_scalar_instructions_units_separators_and_noise_before_the_header(tmp_path):
    path = tmp_path / "k.csv"
    lines = [
        ("smsp__sass_thread_inst_executed_op_ffma_pred_on.sum", "inst", "1,000"),
        ("smsp__sass_thread_inst_executed_op_fadd_pred_on.sum", "inst", "24"),
        ("dram__bytes_read.sum", "Kbyte", "1.5"),
        ("dram__bytes_write.sum", "byte", "500"),
        ("gpu__time_duration.sum", "ms", "2"),
        ("sm__ops_path_tensor_src_bf16_dst_fp32.sum", "", "n/a"),
        ("", "", ""),
    ]
    body = "".join(f'"0","1","void gemm<int>(T1)","S","{m}","{u}","{v}"\n' for m, u, v in lines)
    path.write_text("==PROF== Connected\nprogram output\n" + HEADER + body)
    (point,) = rows(read_ncu([path]))
    assert (point["flops"], point["bytes"], point["time_ns"], point["flops_counted"]) == (
        2024,
        2000,
        2_000_000,
        "scalar",
    )
    assert (point["category"], point["short_name"]) == ("gemm", "gemm")


def test_a_file_that_is_no_csv_of_ncu(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no ncu CSV"):
        read_ncu([path])


RAW = """==PROF== Connected to process 7
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum","sm__ops_path_tensor_src_bf16_dst_fp32.sum",\
"sm__ops_path_tensor_src_bf16_dst_fp32_sparsity_off.sum","smsp__sass_thread_inst_executed_op_ffma_pred_on.sum"
"","","","","","","","","","","","byte","byte","ns","","","inst"
"0","7","python","node1","sm80_xmma_gemm_bf16","1","7","(128, 1, 1)","(80, 1, 1)","0","9.0",\
"2,000,000","1,000,000","20,000","4,294,967,296","4,294,967,296","0"
"1","7","python","node1","void elementwise_kernel<int>(T1)","1","7","(128, 1, 1)","(9, 1, 1)","0","9.0",\
"4,096","4,096","2,000","n/a","n/a","512"
""".replace("\\\n", "")


def test_the_raw_page_has_a_kernel_a_row(tmp_path):
    path = tmp_path / "raw.csv"
    path.write_text(RAW)
    product, elementwise = rows(read_ncu([path]))
    assert (product["bytes"], product["time_ns"], product["category"]) == (3_000_000, 20_000, "gemm")
    assert (product["flops"], product["flops_counted"]) == (2**32, "tensor")  # a counter and a part of it count once
    assert product["flops_per_s"] == pytest.approx(2**32 / 20e-6)
    assert (elementwise["bytes"], elementwise["flops"], elementwise["flops_counted"]) == (8192, 1024, "scalar")
    assert elementwise["flops_per_byte"] == 0.125


def test_the_command_writes_points_and_their_figure(tmp_path, capsys):
    (tmp_path / "raw.csv").write_text(RAW)
    parser = argparse.ArgumentParser()
    add_facts_arguments(parser)
    words = ["--ncu", str(tmp_path / "raw.csv"), "--out", str(tmp_path / "out"), "--figures"]
    assert run_facts(parser.parse_args(words)) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["roofline.csv", "roofline.svg"]
    drawn = (tmp_path / "out" / "roofline.svg").read_text()
    assert "<!-- gemm -->" in drawn
    assert "<!-- elementwise -->" in drawn
    without = {column: [] for column in ("category", "flops_per_byte", "flops_per_s")}
    assert draw_roofline(without, tmp_path) is None


def test_both_layouts_of_real_metrics_give_the_same_points(shared_traces, tmp_path):
    for number in range(1, 7):
        path = shared_traces / "ncu" / f"llm_kernel_000{number}_metrics.csv"
        with path.open(newline="") as file:
            metrics = {row["Metric Name"]: row for row in csv.DictReader(file)}
        kernel = next(iter(metrics.values()))
        header = ["ID", "Kernel Name", *metrics]
        units = ["", "", *(row["Metric Unit"] for row in metrics.values())]
        values = [kernel["ID"], kernel["Kernel Name"], *(row["Metric Value"] for row in metrics.values())]
        with (tmp_path / path.name).open("w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([header, units, values])
        assert rows(read_ncu([tmp_path / path.name])) == rows(read_ncu([path]))


def test_operations_of_tensor_cores_are_counted_once():
    part = "sm__ops_path_tensor_src_bf16_dst_fp32"
    both = [f"{part}.sum", f"{part}_sparsity_on.sum", f"{part}_sparsity_off.sum"]
    assert tensor_counters([*both, "sm__ops_path_tensor_op_hmma_src_bf16.sum", "x.sum"]) == both[:1]
    assert tensor_counters(both[1:]) == sorted(both[1:])
    assert tensor_counters(["sm__ops_path_tensor_op_hmma.sum"]) == ["sm__ops_path_tensor_op_hmma.sum"]
    assert tensor_counters([f"{part}.sum", f"{part}.sum.per_second"]) == [f"{part}.sum"]


def test_a_csv_of_neither_layout_names_what_is_missing(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text('"ID","Kernel Name","Duration"\n"0","k","5"\n')
    with pytest.raises(UserError, match="no column Metric Name, Metric Unit, Metric Value; export with: ncu --import"):
        read_ncu([path])
    path.write_text('"ID","Name","dram__bytes_read.sum"\n"0","k","5"\n')
    with pytest.raises(UserError, match="no column Kernel Name; export"):
        read_ncu([path])
