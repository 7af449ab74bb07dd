"""Tiny models, built and pretrained here: a Qwen2 in a minute or two on two cores, a DistilBERT in 15 seconds.

They read family A of `tunemap.corpora` and are accepted only once they can do what fine-tuning on family B builds on.
A base that knows its equations but cannot copy operands makes fine-tuning a lottery (full fine-tuning reached 98 %
with one seed and 20 % with the next), so training stops at two accuracies, not at a number of steps.

The optimizer is AdamW at a high rate that hardly falls while it is used. Muon passes the gates in two thirds of the
steps, but LoRA on its base reached 20 % with one of two seeds; where AdamW's rate falls fast, no method reached 20 %.

The same seed gives the same bytes on the same kind of CPU, however many cores it has: each half of a batch is computed
by one thread, and random states are private.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tunemap import corpora
from tunemap.config import TinyModel
from tunemap.cross_entropy import IGNORED, cross_entropy_sum
from tunemap.errors import UserError
from tunemap.models.loading import quiet

Architecture = Literal["qwen2", "distilbert"]


@dataclass(frozen=True)
class Recipe:
    """How long to pretrain, how fast to learn, and what to reach."""

    most_steps: int
    learning_rate: float
    warmup_steps: int = 50
    check_steps: int = 100  # steps between two looks at the gates
    gate: float = 0.99  # least value of every accuracy


RECIPES: dict[Architecture, Recipe] = {
    "qwen2": Recipe(most_steps=2000, learning_rate=4e-3),
    "distilbert": Recipe(most_steps=1200, learning_rate=1e-3),
}


@dataclass(frozen=True)
class Pretrained:
    """A tiny model, its tokenizer, and what its pretraining came to."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    steps: int
    seconds: float
    accuracies: dict[str, float]


def architecture(name: Architecture) -> PreTrainedConfig:
    """The config of a tiny model, without pretraining one."""
    if name == "qwen2":
        return _qwen2(corpora.build_arithmetic_tokenizer())
    return _distilbert(corpora.build_sentiment_tokenizer())


def _qwen2(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (corpora.END_OF_TEXT, corpora.MESSAGE_END)}
    return Qwen2Config(
        vocab_size=_rounded(len(tokenizer)),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=corpora.POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ids[corpora.MESSAGE_END],
        pad_token_id=ids[corpora.END_OF_TEXT],
        use_cache=True,
    )


def _distilbert(tokenizer: PreTrainedTokenizerBase) -> DistilBertConfig:
    return DistilBertConfig(
        vocab_size=_rounded(len(tokenizer)),
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=256,
        max_position_embeddings=corpora.SENTIMENT_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
    )


Progress = Callable[[int, dict[str, float]], None]
"""Called with the steps done and the accuracies at that point."""


def make(
    model: TinyModel, folder: Path, *, recipe: Recipe | None = None, show_progress: bool = False
) -> dict[str, Any]:
    """Pretrain the model and write it to `folder` in hub layout; returns the record of its pretraining."""
    made = pretrain(model.architecture, model.seed, recipe=recipe, show=show_progress)
    with quiet():
        made.model.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
    return {"pretraining": {"steps": made.steps, "seconds": round(made.seconds, 1), **made.accuracies}}


def pretrain(architecture: Architecture, seed: int, *, recipe: Recipe | None = None, show: bool = False) -> Pretrained:
    """Build and pretrain a tiny model until both its accuracies pass the gate; `UserError` if they never do."""
    recipe = recipe or RECIPES[architecture]
    begin = time.perf_counter()
    with _one_thread(), torch.random.fork_rng(devices=[]), _progress(architecture, recipe, show) as report:
        torch.manual_seed(seed)
        learner = _Qwen2Learner(seed, recipe) if architecture == "qwen2" else _DistilBertLearner(seed, recipe)
        steps, accuracies = _train(learner, recipe, report)
    if not _passed(accuracies, recipe):
        reached = ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items())
        raise UserError(
            f"tiny {architecture}, seed {seed}: after {steps} steps of pretraining {reached}; "
            f"each must reach {recipe.gate}. Use another seed: fine-tuning such a base would compare luck."
        )
    seconds = time.perf_counter() - begin
    return Pretrained(learner.model.eval(), learner.tokenizer, steps, seconds, accuracies)


class _Learner:
    """A model in training: `backward()` draws the next batch, `accuracies()` measures what the gates ask for."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer

    def backward(self) -> None:
        """Leave the gradients of the next batch's loss in the parameters."""
        raise NotImplementedError

    def accuracies(self) -> dict[str, float]:
        raise NotImplementedError


def _passed(accuracies: dict[str, float], recipe: Recipe) -> bool:
    return all(value >= recipe.gate for value in accuracies.values())


def _train(learner: _Learner, recipe: Recipe, report: Progress) -> tuple[int, dict[str, float]]:
    accuracies: dict[str, float] = {}
    step = 0
    while step < recipe.most_steps:
        learner.model.train()
        for group in learner.optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        learner.backward()
        nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        step += 1
        if step % recipe.check_steps == 0 or step == recipe.most_steps:
            learner.model.eval()
            with torch.no_grad():
                accuracies = learner.accuracies()
            report(step, accuracies)
            if _passed(accuracies, recipe):
                break
    return step, accuracies


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to 5 % at the last step allowed."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.most_steps))
    return recipe.learning_rate * warm * (0.05 + 0.95 * cosine)


# --- Qwen2 ------------------------------------------------------------------------------------------------


class _Qwen2Learner(_Learner):
    """Next-token prediction on packed blocks of family A; gates: all equations, and copying of operands."""

    BATCH, BLOCK = 32, 128  # rows, tokens per row
    DOCUMENTS = 1000  # tokenised at once
    PROBLEMS = 200  # word problems read for the copying gate

    def __init__(self, seed: int, recipe: Recipe) -> None:
        self.tokenizer = corpora.build_arithmetic_tokenizer()
        self.model = Qwen2ForCausalLM(_qwen2(self.tokenizer))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self._rng = random.Random(seed)
        self._tokens: list[int] = []
        # Reading takes a tenth of a step's time, so another core does it; by a tokenizer of its own, since whether one
        # pads is a state of it.
        self._readers_tokenizer = corpora.build_arithmetic_tokenizer()
        self._reader = ThreadPoolExecutor(1)
        self._next = self._reader.submit(self._read)
        # The steps of so small a model are too short for torch to share them out among cores.
        self._second_half = ThreadPoolExecutor(1)

    def _read(self) -> list[int]:
        """Tokens of the next documents."""
        documents = [corpora.pretraining_document(self._rng) for _ in range(self.DOCUMENTS)]
        return list(chain.from_iterable(self._readers_tokenizer(documents)["input_ids"]))

    def backward(self) -> None:
        first, second = self._rows().chunk(2)
        others = self._second_half.submit(self._gradients, second)
        halves = zip(self._gradients(first), others.result(), strict=True)
        for parameter, (one, other) in zip(self.model.parameters(), halves, strict=True):
            parameter.grad = one.add_(other)

    def _rows(self) -> Tensor:
        """The next batch: token ids (BATCH, BLOCK)."""
        count = self.BATCH * self.BLOCK
        while len(self._tokens) < count:
            self._tokens += self._next.result()
            self._next = self._reader.submit(self._read)
        rows = torch.tensor(self._tokens[:count]).view(self.BATCH, self.BLOCK)
        del self._tokens[:count]
        return rows

    def _gradients(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What these rows add to the gradients of the batch's mean loss."""
        targets = nn.functional.pad(rows[:, 1:], (0, 1), value=IGNORED)
        logits = self.model(input_ids=rows, use_cache=False).logits
        loss = cross_entropy_sum(logits.flatten(0, 1), targets.flatten(), IGNORED)
        return torch.autograd.grad(loss / (self.BATCH * (self.BLOCK - 1)), tuple(self.model.parameters()))

    def accuracies(self) -> dict[str, float]:
        return {"equation_accuracy": self._equation_accuracy(), "operand_copy_accuracy": self._copy_accuracy()}

    def _equation_accuracy(self) -> float:
        """Share of all sums and differences of one-digit numbers that are completed rightly."""
        digits = range(corpora.LARGEST_OPERAND + 1)
        cases = [(f"{a} + {b} =", f" {a + b}") for a in digits for b in digits]
        cases += [(f"{a} - {b} =", f" {a - b}") for a in digits for b in digits if b <= a]
        return self._share([(corpora.END_OF_TEXT + prompt, result) for prompt, result in cases])

    def _copy_accuracy(self) -> float:
        """Share of word problems whose two operands are named in order."""
        rng = random.Random(11)  # the same problems for every model
        problems = [corpora.word_problem(rng) for _ in range(self.PROBLEMS)]
        lead = "The numbers are"
        return self._share(
            [(corpora.chat_prompt(p["question"]) + lead, f" {corpora.operands_read(p)}") for p in problems]
        )

    def _share(self, cases: list[tuple[str, str]]) -> float:
        """Share of (prompt, continuation) pairs that greedy generation completes, up to a stop token."""
        prompts = self.tokenizer([p for p, _ in cases], return_tensors="pt", padding=True, padding_side="left")
        expected = self.tokenizer([e for _, e in cases])["input_ids"]
        stops = [self.model.config.pad_token_id, self.model.config.eos_token_id]
        longest = max(map(len, expected))
        output = self.model.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            max_new_tokens=longest + 1,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )[:, prompts["input_ids"].shape[1] :].tolist()
        right = sum(_until(stops, row) == want for row, want in zip(output, expected, strict=True))
        return right / len(cases)


def _until(stops: list[int], ids: list[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


# --- DistilBERT -------------------------------------------------------------------------------------------


class _DistilBertLearner(_Learner):
    """Masked words, plus polarity and subject from the [CLS] vector; gates: those two.

    Masked words alone leave the [CLS] vector useless, and a LoRA fine-tune then stays at chance.
    """

    MASKED_ROWS, LABELLED_ROWS, HELD_OUT_ROWS = 64, 32, 400
    MASKED_SHARE = 0.2

    def __init__(self, seed: int, recipe: Recipe) -> None:
        self.tokenizer = corpora.build_sentiment_tokenizer()
        self.model = DistilBertForMaskedLM(_distilbert(self.tokenizer))
        self._heads = nn.Linear(64, 2 + len(corpora.NOUNS))  # polarity, then subject; thrown away afterwards
        parameters = [*self.model.parameters(), *self._heads.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, fused=True)
        self._rng = random.Random(seed)

    def backward(self) -> None:
        (self._masked_word_loss() + self._labelled_loss()).backward()

    def _masked_word_loss(self) -> Tensor:
        batch = self._tokens([corpora.unlabelled_review(self._rng) for _ in range(self.MASKED_ROWS)])
        special = len(self.tokenizer.all_special_ids)  # their ids come first
        masked = (torch.rand(batch["input_ids"].shape) < self.MASKED_SHARE) & (batch["input_ids"] >= special)
        labels = batch["input_ids"].masked_fill(~masked, IGNORED)
        hidden = batch["input_ids"].masked_fill(masked, self.tokenizer.mask_token_id)
        return self.model(input_ids=hidden, attention_mask=batch["attention_mask"], labels=labels).loss

    def _labelled_loss(self) -> Tensor:
        rows = [corpora.plain_review(self._rng) for _ in range(self.LABELLED_ROWS)]
        polarity, subject = self._logits(rows)
        return cross_entropy(polarity, _column(rows, "label")) + cross_entropy(subject, _column(rows, "noun"))

    def accuracies(self) -> dict[str, float]:
        rng = random.Random(11)  # the same reviews for every model
        rows = [corpora.plain_review(rng) for _ in range(self.HELD_OUT_ROWS)]
        polarity, subject = (logits.argmax(-1) for logits in self._logits(rows))
        return {
            "polarity_accuracy": (polarity == _column(rows, "label")).float().mean().item(),
            "subject_accuracy": (subject == _column(rows, "noun")).float().mean().item(),
        }

    def _logits(self, rows: list[corpora.PlainReview]) -> tuple[Tensor, Tensor]:
        states = self.model.distilbert(**self._tokens([row["text"] for row in rows])).last_hidden_state
        logits = self._heads(states[:, 0])
        return logits[:, :2], logits[:, 2:]

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        batch = self.tokenizer(texts, return_tensors="pt", padding=True)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _column(rows: list[Any], key: str) -> Tensor:
    return torch.tensor([row[key] for row in rows])


# --- both -------------------------------------------------------------------------------------------------


def _rounded(entries: int) -> int:
    """Vocabulary rows: a multiple of 64, as matrix units like it."""
    return -(-entries // 64) * 64


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch and tokenizers: the number of threads changes the last bits of a sum."""
    threads, parallel = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if parallel is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel


@contextmanager
def _progress(architecture: Architecture, recipe: Recipe, show: bool) -> Iterator[Progress]:
    """A bar with the time left on a terminal, a line at each check elsewhere; steps count to the last one allowed."""
    title = f"pretraining tiny {architecture}"
    if not show:
        yield lambda step, accuracies: None
        return
    if not sys.stderr.isatty():
        begin = time.perf_counter()

        def line(step: int, accuracies: dict[str, float]) -> None:
            elapsed = time.perf_counter() - begin
            left = elapsed / step * (recipe.most_steps - step)
            print(
                f"{title}: step {step}, {_written(accuracies)}, {elapsed:.0f} s, at most {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.fields[reached]}"),
        TimeElapsedColumn(),
        TextColumn("at most"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=recipe.most_steps, reached="")
        yield lambda step, accuracies: bar.update(task, completed=step, reached=_written(accuracies))


def _written(accuracies: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in accuracies.items())
