"""What a finished run costs when it is used: latency, tokens/s and memory of base, merged and unmerged adapter, 4 bits.

One example at a time, as somebody waits for it: WARM_UP calls first, then REPETITIONS that are timed one by one, the
device synchronised before and after each. A generation has exactly NEW_TOKENS tokens, whatever the model would say, so
that models are compared at equal work; a classification is one forward pass.

    results/STUDY/inference/RUN.json    {"run", "training_digest", "outcome", "reason", "forms": [{"form", ...}]}
    results/STUDY/tables/inference.csv  one row per run and form

A form is `base` (the model before fine-tuning), `full` (all weights trained), `unmerged` (adapter beside its base),
`merged` (adapter added into the weights) or `four_bit` (base in NF4, adapter beside it).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tunemap.config import AdapterMethod, LoraMethod, LowRankMethod, QloraMethod
from tunemap.data.collate import collate
from tunemap.data.tokens import Tokens, load_tokens
from tunemap.errors import UserError
from tunemap.evaluate import load_trained
from tunemap.files import read_json, write_json
from tunemap.measure.memory import track_live_storage
from tunemap.models.loading import Quantization, load_model
from tunemap.run import Run
from tunemap.training.devices import lease_devices
from tunemap.training.precision import PRECISIONS

WARM_UP, REPETITIONS, NEW_TOKENS = 3, 20, 16
Loader = Callable[[], nn.Module]


def measure_to_file(
    run: Run, *, device: str, model: Path, tokens: Path, outcome: Path, weights: Path, output: Path
) -> None:
    """Measure every form of a finished run; one that fails keeps its reason, and so does a run that did not end ok."""
    trained = read_json(outcome)
    result: dict[str, Any] = {"run": run.id, "training_digest": run.training_digest, "outcome": "ok", "reason": None}
    forms: list[dict[str, Any]] = []
    if trained["digest"] != run.training_digest:
        raise UserError(f"{outcome} is of another configuration: train the run again")
    if trained["outcome"] != "ok":
        result |= {"outcome": "skipped", "reason": f"the training ended with outcome {trained['outcome']}"}
    else:
        with lease_devices(device, 1) as devices:
            if devices.kind == "cuda":
                os.environ |= devices.environment  # torch has not asked for a device yet
            torch.set_num_threads(run.factors.threads_per_process)
            loaded = load_tokens(tokens)
            for form, load in _forms(run, model, weights, loaded, devices.kind):
                forms.append({"form": form, **_measured(load, run, loaded, devices.kind)})
                print(forms[-1], flush=True)
    write_json(output, result | {"forms": forms})


def _forms(run: Run, model: Path, weights: Path, tokens: Tokens, device: str) -> Iterator[tuple[str, Loader]]:
    labels, precision = len(tokens.label_names) or None, PRECISIONS[run.factors.precision]

    def plain(folder: Path, dtype: torch.dtype, *, packed: bool = False) -> nn.Module:
        return load_model(
            folder,
            task_kind=run.task_kind,
            num_labels=labels,
            dtype=dtype,
            quantization=Quantization("nf4", True, precision.compute) if packed else None,
            attention=run.factors.attention,
            seed=run.factors.seed,
            device=device,
        )

    def adapted(over: Run) -> nn.Module:
        return load_trained(over, model, weights, num_labels=labels, device=device)

    yield "base", lambda: plain(model, precision.frozen)
    if not isinstance(run.method, AdapterMethod):
        yield "full", lambda: plain(weights, precision.trained)
        yield "four_bit", lambda: plain(weights, precision.frozen, packed=True)
        return
    unpacked, packed = run, run
    if isinstance(run.method, LowRankMethod):  # the adapter's file says what it is; the method only what it lies over
        dtype = run.method.adapter_dtype
        unpacked = run.model_copy(update={"method": LoraMethod(kind="lora", adapter_dtype=dtype)})
        packed = run.model_copy(update={"method": QloraMethod(kind="qlora", adapter_dtype=dtype)})
    yield "unmerged", lambda: adapted(unpacked)
    yield "merged", lambda: _merged(adapted(unpacked))
    if packed is not run:
        yield "four_bit", lambda: adapted(packed)


def _merged(model: Any) -> nn.Module:
    merged: nn.Module = model.merge_and_unload()
    return merged


def _measured(load: Loader, run: Run, tokens: Tokens, device: str) -> dict[str, Any]:
    """Times and memory of one form, or the reason why it has none."""
    try:
        model = load().eval()
        call, count = _call(model, tokens, device)
        with torch.inference_mode(), PRECISIONS[run.factors.precision].autocast_context(device):
            latencies = timed(call, device)
            peak = _peak_bytes(model, call, device)
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
    return {"reason": None, "peak_allocated_bytes": peak} | summary(latencies, count)


def _call(model: Any, tokens: Tokens, device: str) -> tuple[Callable[[int], Any], int]:
    """What is timed, for the example of a number, and how many tokens (or texts) one call makes."""
    examples = tokens.test
    if tokens.task_kind == "classification":
        batches = [
            collate(examples, [np.array([i])], pad_token_id=tokens.pad_token_id).to(device).inputs
            for i in range(min(len(examples), WARM_UP + REPETITIONS))
        ]
        return lambda number: model(**batches[number % len(batches)]), 1
    prompts = [
        torch.from_numpy(examples.sequence(i).astype(np.int64))[None].to(device)
        for i in range(min(len(examples), WARM_UP + REPETITIONS))
    ]

    def generate(number: int) -> Any:
        prompt = prompts[number % len(prompts)]
        return model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=tokens.pad_token_id,
        )

    return generate, NEW_TOKENS


def timed(call: Callable[[int], Any], device: str) -> list[float]:
    """Seconds of each repetition after the warm-up, the device idle before and after."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for number in range(WARM_UP + REPETITIONS):
        wait()
        started = time.perf_counter()
        call(number)
        wait()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
    return seconds


def summary(latencies: list[float], count: int) -> dict[str, Any]:
    """Mean, median and 95th percentile in seconds, and tokens (or texts) per second of the mean."""
    mean = float(np.mean(latencies))
    return {
        "repetitions": len(latencies),
        "latency_mean_s": mean,
        "latency_median_s": float(np.median(latencies)),
        "latency_p95_s": float(np.percentile(latencies, 95)),
        "units_per_call": count,
        "units_per_second": count / mean,
    }


def _peak_bytes(model: nn.Module, call: Callable[[int], Any], device: str) -> int:
    """Largest memory held by tensors during one more call, weights included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call(0)
        return int(torch.cuda.max_memory_allocated())
    with track_live_storage(model) as tracker:
        call(0)
    return tracker.peak_allocated_bytes
