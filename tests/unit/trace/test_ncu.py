"""Roofline points from Nsight Compute CSV."""

import pytest
from test_real_traces import rows

from tunemap.errors import UserError
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


def test_the_raw_page_names_what_is_missing(tmp_path):
    path = tmp_path / "raw.csv"
    path.write_text('"ID","Kernel Name","dram__bytes_read.sum"\n"","","byte"\n"0","k","5"\n')
    with pytest.raises(UserError, match="no column Metric Name, Metric Unit, Metric Value; export with --page details"):
        read_ncu([path])
