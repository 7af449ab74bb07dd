"""What every measured column means: unit, definition, and where the number comes from. The report prints this list."""

from __future__ import annotations

from dataclasses import dataclass

CLOCK = "clock around the optimizer step: device events on CUDA, host clock on CPU"
TRACKER = "allocator statistics on CUDA, live-storage tracker on CPU; training only, largest rank"
COUNT = "count"


@dataclass(frozen=True)
class Definition:
    """One column of runs.csv."""

    unit: str
    text: str
    source: str


DEFINITIONS: dict[str, Definition] = {
    "tokens_per_second": Definition(
        "tokens/s", "Real (non-padding) tokens of the measured steps, all ranks, over the slowest rank's time.", CLOCK
    ),
    "label_tokens_per_second": Definition("tokens/s", "The same with tokens that carry loss.", CLOCK),
    "padded_tokens_per_second": Definition("tokens/s", "The same with every token computed, padding too.", CLOCK),
    "samples_per_second": Definition("examples/s", "Training examples per second of the measured steps.", CLOCK),
    "seconds_per_10k_tokens": Definition("s", "Time for 10,000 real tokens.", CLOCK),
    "steps": Definition("steps", "Optimizer steps that were made.", COUNT),
    "measured_steps": Definition("steps", "Steps that count for time and throughput: those after the warm-up.", COUNT),
    "step_time_mean_s": Definition("s", "Mean time of a measured optimizer step.", CLOCK),
    "step_time_sd_s": Definition("s", "Standard deviation of the step time within the run.", CLOCK),
    "step_time_cv": Definition("1", "Standard deviation over mean of the step time.", CLOCK),
    "step_time_median_s": Definition("s", "Median time of a measured optimizer step.", CLOCK),
    "step_time_p95_s": Definition("s", "95 % of the measured steps took no longer.", CLOCK),
    "data_time_mean_s": Definition("s", "Part of the step spent waiting for the batch.", CLOCK),
    "forward_time_mean_s": Definition("s", "Part of the step spent in the forward pass.", CLOCK),
    "backward_time_mean_s": Definition("s", "Part of the step spent in the backward pass.", CLOCK),
    "optimizer_time_mean_s": Definition("s", "Part of the step spent clipping and updating.", CLOCK),
    "peak_allocated_bytes": Definition("bytes", "Largest memory held by tensors at any moment of training.", TRACKER),
    "peak_reserved_bytes": Definition(
        "bytes", "Largest memory that the allocator held, its cache included.", "CUDA allocator; empty on CPU"
    ),
    "end_allocated_bytes": Definition("bytes", "Memory held by tensors after the last step.", TRACKER),
    "driver_process_bytes": Definition("bytes", "Memory of this process as the driver sees it.", "NVML; empty on CPU"),
    "host_rss_peak_bytes": Definition(
        "bytes", "Largest resident memory of the process; the allocator of the host keeps freed memory.", "kernel"
    ),
    "parameters_bytes": Definition("bytes", "Of the peak: parameters, 4-bit ones by their packed size.", TRACKER),
    "gradients_bytes": Definition("bytes", "Of the peak: gradients.", TRACKER),
    "optimizer_bytes": Definition("bytes", "Of the peak: states of the optimizer.", TRACKER),
    "activations_bytes": Definition("bytes", "Of the peak: what the forward pass keeps for the backward.", TRACKER),
    "other_bytes": Definition("bytes", "Of the peak: everything else, such as batches and workspaces.", TRACKER),
    "step_period_mean_s": Definition(
        "s", "Mean over measured steps of step time and data wait: what throughput divides by.", "as step time"
    ),
    "cpu_time_mean_s": Definition("s", "CPU time of a process per measured step, all its threads.", "kernel"),
    "tokens_per_step_mean": Definition("tokens", "Real tokens of a measured step, all devices together.", COUNT),
    "model_flops_per_step": Definition(
        "FLOPs", "What the mathematics of a measured step needs, recomputation left out; all devices.", "closed form"
    ),
    "hardware_flops_per_step": Definition(
        "FLOPs", "What the devices compute in a measured step, recomputation included.", "closed form"
    ),
    "model_flops_per_second": Definition("FLOPs/s", "Model FLOPs of a step over its period; all devices.", "both"),
    "mfu_measured": Definition("share", "Model FLOPs/s over the best matrix product of this device.", "both"),
    "hfu_measured": Definition("share", "Hardware FLOPs/s over the best matrix product of this device.", "both"),
    "mfu_datasheet": Definition("share", "Model FLOPs/s over the dense peak of the datasheet.", "both"),
    "hfu_datasheet": Definition("share", "Hardware FLOPs/s over the dense peak of the datasheet.", "both"),
    "energy_joules": Definition(
        "J", "Energy of the boards from the end of warm-up to the end of training.", "NVML counter; empty without one"
    ),
    "energy_window_s": Definition("s", "Length of the energy window.", "host clock"),
    "energy_window_tokens": Definition("tokens", "Real tokens trained on in the energy window.", COUNT),
    "energy_per_token_joules": Definition("J/token", "Energy of the window over its tokens.", "NVML counter"),
    "energy_per_10k_tokens_joules": Definition("J", "Energy of 10,000 real tokens.", "NVML counter"),
    "power_limit_joules": Definition(
        "J", "Power limit times the window: an upper estimate and no measurement.", "power limit of the driver"
    ),
    "cost": Definition("currency", "Price per device-hour × devices × wall time.", "hardware file"),
    "cost_per_10k_tokens": Definition("currency", "The same for 10,000 tokens at the measured speed.", "hardware file"),
    "cost_currency": Definition("", "Currency of the price.", "hardware file"),
    "train_loss": Definition(
        "nats/token", "Training loss at the end: mean over the last 10 steps of the loss per label token.", "model"
    ),
    "trainable_parameters": Definition("parameters", "Parameters that receive gradients.", "logical shapes"),
    "total_parameters": Definition(
        "parameters", "All parameters: 4-bit ones by their logical shape, tied ones once.", "logical shapes"
    ),
    "adapter_parameters": Definition("parameters", "Parameters of the adapters.", "logical shapes"),
    "head_parameters": Definition("parameters", "Parameters of a new output layer.", "logical shapes"),
    "load_time_s": Definition("s", "Loading model and data; not part of any throughput.", "host clock"),
    "compile_time_s": Definition("s", "Compiling; not part of any throughput.", "host clock"),
    "estimation_time_s": Definition("s", "Choosing ranks from gradients before training.", "host clock"),
    "train_time_s": Definition("s", "All training steps, warm-up included.", "host clock"),
    "checkpoint_time_s": Definition("s", "Writing checkpoints.", "host clock"),
    "save_time_s": Definition("s", "Writing the result.", "host clock"),
    "other_time_s": Definition("s", "What is in no other part, such as the fingerprint.", "host clock"),
    "wall_time_s": Definition("s", "The whole run; the parts above add up to it within 2 %.", "host clock"),
    "tokens": Definition("tokens", "Real tokens trained on.", COUNT),
    "label_tokens": Definition("tokens", "Tokens trained on that carry a label.", COUNT),
    "padded_tokens": Definition("tokens", "Positions computed, padding included.", COUNT),
    "padding_waste_share": Definition("share", "Share of positions that are padding.", COUNT),
    "steps_planned": Definition("steps", "Optimizer steps of the schedule.", COUNT),
    "samples": Definition("examples", "Examples trained on, repeats included.", COUNT),
    "data_order_hash": Definition(
        "", "Digest of the examples in their order; equal for all methods of a seed.", "data"
    ),
    "accuracy": Definition(
        "share",
        "Correct answers on the test split by the named metric; strict extraction for generation.",
        "evaluation",
    ),
    "accuracy_low": Definition("share", "Lower end of the 95 % Wilson interval of a run.", "evaluation"),
    "accuracy_high": Definition("share", "Upper end of the 95 % Wilson interval of a run.", "evaluation"),
    "accuracy_flexible": Definition("share", "Correct answers if the last number counts as the answer.", "evaluation"),
    "malformed_share": Definition("share", "Answers without the asked form.", "evaluation"),
    "truncated_share": Definition("share", "Answers cut by the generation limit.", "evaluation"),
    "evaluation_time_s": Definition("s", "Evaluating; not part of any throughput.", "host clock"),
}
