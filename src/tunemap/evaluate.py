"""Evaluation on the test split: greedy generation or classification, every prediction kept, the base model alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tunemap.config import AdapterMethod, LowRankMethod
from tunemap.data.answers import score
from tunemap.data.tokens import Tokens, load_tokens
from tunemap.gates import generation_limit_gate
from tunemap.models.loading import load_model, load_tokenizer
from tunemap.run import Run
from tunemap.statistics import wilson
from tunemap.training.assemble import quantization_of
from tunemap.training.precision import DTYPES, PRECISIONS


@dataclass(frozen=True)
class Prediction:
    """One test example with what the model made of it. For a classification only `output` and `correct` count."""

    id: str
    prompt: str
    reference: str
    output: str
    extracted_strict: str | None
    extracted_flexible: str | None
    correct: bool
    correct_flexible: bool | None
    malformed: bool | None  # no answer in the strict form
    truncated: bool | None  # the generation limit ended it


def evaluate(
    run: Run, model_folder: Path, weights_folder: Path, tokens_folder: Path, *, device: str
) -> tuple[dict[str, Any], list[Prediction]]:
    """Evaluate a trained run (or the base model) on the test split; returns the summary and all predictions."""
    torch.set_num_threads(run.factors.threads_per_process)
    tokens = load_tokens(tokens_folder)
    model = load_trained(run, model_folder, weights_folder, num_labels=len(tokens.label_names) or None, device=device)
    model.eval()
    started = time.perf_counter()
    precision = PRECISIONS[run.factors.precision]
    gates = []
    with torch.inference_mode(), precision.autocast_context(device):
        if tokens.task_kind == "classification":
            predictions = list(_classify(model, tokens, run.factors.evaluation_batch_size, device))
        else:
            limit = run.factors.max_new_tokens or int(tokens.statistics["longest_reference_tokens"])
            gates.append(generation_limit_gate(tokens.statistics, limit))
            tokenizer = load_tokenizer(model_folder)
            predictions = list(_generate(model, tokenizer, tokens, run.factors.evaluation_batch_size, limit, device))
    summary = summarise(predictions, tokens)
    summary |= {
        "max_new_tokens": limit if tokens.task_kind == "generation" else None,
        "evaluation_time_s": time.perf_counter() - started,
        "gates": [vars(gate) for gate in gates],
    }
    return summary, predictions


def load_trained(
    run: Run, model_folder: Path, weights_folder: Path, *, num_labels: int | None, device: str
) -> nn.Module:
    """The model of a finished run, with its weights as training left them and its base as training saw it."""
    precision = PRECISIONS[run.factors.precision]
    method = run.method
    adapter = isinstance(method, AdapterMethod)
    model = load_model(
        model_folder if adapter or run.is_base else weights_folder,
        task_kind=run.task_kind,
        num_labels=num_labels,
        dtype=precision.frozen if adapter or run.is_base else precision.trained,
        quantization=quantization_of(run, precision),
        attention=run.factors.attention,
        seed=run.factors.seed,
        device=device,
    )
    if isinstance(method, AdapterMethod):
        from peft import PeftModel

        # peft makes adapters in the base's dtype, which may hold less than they do: float32 first, then as in training.
        low_rank = isinstance(method, LowRankMethod)
        in_float32 = low_rank or method.adapter_dtype == "float32"
        model = PeftModel.from_pretrained(model, weights_folder, autocast_adapter_dtype=in_float32)
        for name, parameter in model.named_parameters() if low_rank else ():
            if "lora_" in name:
                parameter.data = parameter.data.to(DTYPES[method.adapter_dtype])
    return model


def summarise(predictions: Sequence[Prediction], tokens: Tokens) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, and the shares that explain it."""
    count, correct = len(predictions), sum(prediction.correct for prediction in predictions)
    interval = wilson(correct, count)
    generation = tokens.task_kind == "generation"
    return {
        "task": tokens.task,
        "task_kind": tokens.task_kind,
        "split": "test",
        "metric": "exact_match_strict" if generation else "accuracy",
        "n": count,
        "correct": correct,
        "accuracy": correct / count,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "accuracy_flexible": _share(predictions, "correct_flexible") if generation else None,
        "malformed_share": _share(predictions, "malformed") if generation else None,
        "truncated_share": _share(predictions, "truncated") if generation else None,
    }


def _share(predictions: Sequence[Prediction], name: str) -> float:
    return sum(bool(getattr(prediction, name)) for prediction in predictions) / len(predictions)


def _generate(
    model: nn.Module, tokenizer: Any, tokens: Tokens, batch_size: int, limit: int, device: str
) -> Iterator[Prediction]:
    """Greedy generation, left-padded so that all prompts end where generation begins; in order of length."""
    order = np.argsort(tokens.test.lengths, kind="stable")
    outputs: dict[int, tuple[str, bool]] = {}
    started = time.perf_counter()
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        input_ids, attention_mask = _left_padded(
            [tokens.test.sequence(i) for i in indices], tokens.pad_token_id, device
        )
        generated = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )[:, input_ids.shape[1] :]
        ended = (generated == tokens.eos_token_id).any(dim=1).tolist()
        texts = tokenizer.batch_decode(_until_end(generated, tokens), skip_special_tokens=True)
        outputs |= dict(zip(indices.tolist(), zip(texts, [not end for end in ended], strict=True), strict=True))
        done, elapsed_s = min(start + batch_size, len(order)), time.perf_counter() - started
        left_s = elapsed_s / done * (len(order) - done)
        print(f"evaluated {done}/{len(order)}  {elapsed_s:.1f} s, {left_s:.0f} s left", flush=True)
    for index, row in enumerate(tokens.test_rows):
        text, truncated = outputs[index]
        scored = score(tokens.task, text, row["reference"])
        yield Prediction(
            id=row["id"],
            prompt=row["prompt"],
            reference=row["reference"],
            output=text,
            extracted_strict=scored.extracted_strict,
            extracted_flexible=scored.extracted_flexible,
            correct=scored.correct,
            correct_flexible=scored.correct_flexible,
            malformed=scored.malformed,
            truncated=truncated,
        )


def _until_end(generated: torch.Tensor, tokens: Tokens) -> list[list[int]]:
    rows = []
    for row in generated.tolist():
        rows.append(row[: row.index(tokens.eos_token_id)] if tokens.eos_token_id in row else row)
    return rows


def _left_padded(sequences: list[Any], pad_token_id: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(sequence) for sequence in sequences)
    input_ids = np.full((len(sequences), width), pad_token_id, np.int64)
    attention_mask = np.zeros((len(sequences), width), np.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, width - len(sequence) :] = sequence
        attention_mask[row, width - len(sequence) :] = 1
    return torch.from_numpy(input_ids).to(device), torch.from_numpy(attention_mask).to(device)


def _classify(model: nn.Module, tokens: Tokens, batch_size: int, device: str) -> Iterator[Prediction]:
    from tunemap.data.collate import collate

    order = np.argsort(tokens.test.lengths, kind="stable")
    chosen: dict[int, int] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        rows = [np.array([index]) for index in indices]
        batch = collate(tokens.test, rows, pad_token_id=tokens.pad_token_id).to(device)
        chosen |= dict(zip(indices.tolist(), model(**batch.inputs).logits.argmax(-1).tolist(), strict=True))
    for index, row in enumerate(tokens.test_rows):
        output = tokens.label_names[chosen[index]]
        correct = output == row["reference"]
        yield Prediction(row["id"], row["prompt"], row["reference"], output, None, None, correct, None, None, None)
