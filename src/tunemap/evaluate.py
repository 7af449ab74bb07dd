"""One process of an evaluation: greedy generation or classification of its batches, the base model alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tunemap.config import AdapterMethod, Factors, LowRankMethod, PeftMethod
from tunemap.data.answers import score
from tunemap.data.collate import collate
from tunemap.data.tokens import Tokens, load_tokens
from tunemap.gates import generation_limit_gate
from tunemap.methods.peft_registry import SUPPORTED
from tunemap.models.loading import load_model, load_tokenizer
from tunemap.predictions import Indices, Prediction, Share, batches_of
from tunemap.run import Run
from tunemap.training.assemble import quantization_of
from tunemap.training.precision import DTYPES, PRECISIONS


def evaluate_share(
    run: Run,
    model_folder: Path,
    weights_folder: Path,
    tokens_folder: Path,
    *,
    device: str,
    rank: int = 0,
    world_size: int = 1,
    beat: Callable[[int], None] = lambda batch: None,
) -> Share:
    """Let a trained run (or the base model) answer this process's batches of the test split.

    Each process holds the whole model: what training had to shard for its gradients and states fits without them.
    `beat` is told the number of each batch that begins, as a sign of life.
    """
    torch.set_num_threads(run.factors.threads_per_process)
    tokens = load_tokens(tokens_folder)
    model = load_trained(run, model_folder, weights_folder, num_labels=len(tokens.label_names) or None, device=device)
    model.eval()
    batch_size = run.factors.evaluation_batch_size
    # Padding on the left would come between virtual tokens and prompt, and peft drops positions that close the gap.
    unpadded = isinstance(run.method, PeftMethod) and SUPPORTED[run.method.type].hides_padding
    batches = batches_of(tokens.test.lengths, batch_size, rank=rank, world_size=world_size, unpadded=unpadded)
    answer: Callable[[Indices], dict[int, Prediction]] = partial(_classify, model, tokens, device)
    limit, gates = None, []
    if tokens.task_kind == "generation":
        limit = run.factors.max_new_tokens or int(tokens.statistics["longest_reference_tokens"])
        gates.append(generation_limit_gate(tokens.statistics, limit))
        answer = partial(_generate, model, load_tokenizer(model_folder), tokens, run.factors, limit, device)
    predictions: dict[int, Prediction] = {}
    count, started = sum(map(len, batches)), time.perf_counter()
    with torch.inference_mode(), PRECISIONS[run.factors.precision].autocast_context(device):
        for number, indices in enumerate(batches):
            beat(number)
            predictions |= answer(indices)
            seconds = time.perf_counter() - started
            if rank == 0:
                left_s = seconds / len(predictions) * (count - len(predictions))
                where = f" by the first of {world_size} processes" if world_size > 1 else ""
                print(f"evaluated {len(predictions)}/{count}{where}  {seconds:.1f} s, {left_s:.0f} s left", flush=True)
    return Share(predictions, limit, gates, time.perf_counter() - started)


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
        from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

        from tunemap.methods.apply import set_dtypes

        in_float32 = isinstance(method, LowRankMethod) or method.adapter_dtype == "float32"
        model = PeftModel.from_pretrained(model, weights_folder, autocast_adapter_dtype=in_float32)
        # peft makes adapters and heads in the base's dtype, which may hold less than they do: load them once more.
        saved = load_peft_weights(str(weights_folder), device="cpu")
        set_dtypes(model, DTYPES[method.adapter_dtype], precision.trained, trained=saved.keys())
        set_peft_model_state_dict(model, saved)
    return model


def _generate(
    model: nn.Module, tokenizer: Any, tokens: Tokens, factors: Factors, limit: int, device: str, indices: Indices
) -> dict[int, Prediction]:
    """Greedy generation, left-padded so that all prompts of the batch end where generation begins."""
    input_ids, attention_mask = _left_padded([tokens.test.sequence(i) for i in indices], tokens.pad_token_id, device)
    ends = ends_of(model, tokens)
    generated = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=tokens.pad_token_id,
    )[:, input_ids.shape[1] :].tolist()
    answers = [_until_end(row, ends) for row in generated]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return {
        index: _scored(tokens, index, text, extraction=factors.extraction, truncated=len(answer) == len(row))
        for index, text, answer, row in zip(indices.tolist(), texts, answers, generated, strict=True)
    }


def ends_of(model: Any, tokens: Tokens) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and what else the model's generation_config names.

    Training ends answers with the tokenizer's alone, while a chat model as published may end them with another
    (Qwen2.5-Instruct names two, Llama 3 three). Trained or not, a model stops at all of them.
    """
    named: int | list[int] | None = model.generation_config.eos_token_id
    ends = [tokens.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({end for end in ends if end is not None})


def _scored(tokens: Tokens, index: int, text: str, *, extraction: str, truncated: bool) -> Prediction:
    row = tokens.test_rows[index]
    scored = score(tokens.task, text, row["reference"], extraction=extraction)
    return Prediction(
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


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]


def _left_padded(sequences: list[Any], pad_token_id: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(sequence) for sequence in sequences)
    input_ids = np.full((len(sequences), width), pad_token_id, np.int64)
    attention_mask = np.zeros((len(sequences), width), np.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, width - len(sequence) :] = sequence
        attention_mask[row, width - len(sequence) :] = 1
    return torch.from_numpy(input_ids).to(device), torch.from_numpy(attention_mask).to(device)


def _classify(model: nn.Module, tokens: Tokens, device: str, indices: Indices) -> dict[int, Prediction]:
    """The class that the model finds likeliest for each text of the batch."""
    rows = [np.array([index]) for index in indices]
    batch = collate(tokens.test, rows, pad_token_id=tokens.pad_token_id).to(device)
    chosen = model(**batch.inputs).logits.argmax(-1).tolist()
    predictions = {}
    for index, label in zip(indices.tolist(), chosen, strict=True):
        row, output = tokens.test_rows[index], tokens.label_names[label]
        correct = output == row["reference"]
        predictions[index] = Prediction(
            row["id"], row["prompt"], row["reference"], output, None, None, correct, None, None, None
        )
    return predictions
