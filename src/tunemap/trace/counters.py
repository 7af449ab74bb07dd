"""Counters of Nsight Compute that say what a kernel took: time, bytes of device memory, floating-point operations.

A multiply-add is two operations. Names: https://docs.nvidia.com/nsight-compute/ProfilingGuide/index.html#metrics-reference
"""

from collections.abc import Iterable

TIME, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
FLOPS_PER_INSTRUCTION = {
    "smsp__sass_thread_inst_executed_op_fadd_pred_on.sum": 1,
    "smsp__sass_thread_inst_executed_op_fmul_pred_on.sum": 1,
    "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum": 2,
    "smsp__sass_thread_inst_executed_op_hadd_pred_on.sum": 1,
    "smsp__sass_thread_inst_executed_op_hmul_pred_on.sum": 1,
    "smsp__sass_thread_inst_executed_op_hfma_pred_on.sum": 2,
    "smsp__sass_thread_inst_executed_op_dadd_pred_on.sum": 1,
    "smsp__sass_thread_inst_executed_op_dmul_pred_on.sum": 1,
    "smsp__sass_thread_inst_executed_op_dfma_pred_on.sum": 2,
}
METRICS = (TIME, READ, WRITTEN, *FLOPS_PER_INSTRUCTION)  # all but those of tensor cores, whose names GPUs differ in
TENSOR_PREFIX = "sm__ops_path_tensor_"


def tensor_counters(metrics: Iterable[str]) -> list[str]:
    """Those of the metrics that count operations of tensor cores, each operation once.

    A counter is the sum of those that its name begins (`…src_bf16_dst_fp32` of `…src_bf16_dst_fp32_sparsity_off`), and
    the family `…op_…` counts what the others count by another key; it is used where there is nothing else.
    """
    names = {name for name in metrics if name.startswith(TENSOR_PREFIX)}
    stems = {name.partition(".")[0] for name in names}
    by_operation = {stem for stem in stems if stem.startswith(f"{TENSOR_PREFIX}op_")}
    stems = stems - by_operation or by_operation
    outer = {stem for stem in stems if not any(stem.startswith(f"{other}_") for other in stems)}
    return sorted(name for name in names if name.partition(".")[0] in outer and name.endswith(".sum"))
