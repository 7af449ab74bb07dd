"""Tiny models, built and pretrained here: a Qwen2 in a minute on two cores, a DistilBERT in 15 seconds.

They read family A of `tunemap.corpora` and are accepted only if they can do what fine-tuning on family B builds on.
The learning rate falls to the end: at a constant one, what a base can do jumps from check to check (one that knew 99 %
of its equations knew none 50 steps later), and where pretraining stops decides how well each method ends.

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

    steps: int
    learning_rate: float
    warmup_steps: int = 50
    check_steps: int = 200  # steps between two looks at the accuracies
    gate: float = 0.99  # least value of every accuracy at the end


RECIPES: dict[Architecture, Recipe] = {
    "qwen2": Recipe(steps=800, learning_rate=7e-3),
    "distilbert": Recipe(steps=150, learning_rate=1e-3),
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
    """Build and pretrain a tiny model; `UserError` if one of its accuracies is below the gate in the end."""
    recipe = recipe or RECIPES[architecture]
    begin = time.perf_counter()
    with _one_thread(), torch.random.fork_rng(devices=[]), _progress(architecture, recipe, show) as report:
        torch.manual_seed(seed)
        learner = _Qwen2Learner(seed, recipe) if architecture == "qwen2" else _DistilBertLearner(seed, recipe)
        accuracies = _train(learner, recipe, report)
    if not _passed(accuracies, recipe):
        reached = ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items())
        raise UserError(
            f"tiny {architecture}, seed {seed}: after {recipe.steps} steps of pretraining {reached}; "
            f"each must reach {recipe.gate}. Use another seed: fine-tuning such a base would compare luck."
        )
    seconds = time.perf_counter() - begin
    return Pretrained(learner.model.eval(), learner.tokenizer, recipe.steps, seconds, accuracies)


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


def _train(learner: _Learner, recipe: Recipe, report: Progress) -> dict[str, float]:
    accuracies: dict[str, float] = {}
    for step in range(recipe.steps):
        learner.model.train()
        for group in learner.optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        learner.backward()
        nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        done = step + 1
        if done % recipe.check_steps == 0 or done == recipe.steps:
            learner.model.eval()
            with torch.no_grad():
                accuracies = learner.accuracies()
            report(done, accuracies)
    return accuracies


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to 5 % at the last step."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return recipe.learning_rate * warm * (0.05 + 0.95 * cosine)


# --- Qwen2 ------------------------------------------------------------------------------------------------


class _Qwen2Learner(_Learner):
    """Next-token prediction on packed blocks of family A; gates: all equations, and the reading of word problems."""

    BATCH, BLOCK = 16, 128  # rows, tokens per row
    DOCUMENTS = 1000  # tokenised at once
    PROBLEMS = 200  # word problems read for their gate

    def __init__(self, seed: int, recipe: Recipe) -> None:
        self.tokenizer = corpora.build_arithmetic_tokenizer()
        self.model = Qwen2ForCausalLM(_qwen2(self.tokenizer))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self._rng = random.Random(seed)
        self._tokens: list[tuple[int, int]] = []  # each with its label
        # Reading takes a tenth of a step's time, so another core does it; by a tokenizer of its own, since whether one
        # pads is a state of it.
        self._readers_tokenizer = corpora.build_arithmetic_tokenizer()
        self._reader = ThreadPoolExecutor(1)
        self._next = self._reader.submit(self._read)
        # The steps of so small a model are too short for torch to share them out among cores.
        self._second_half = ThreadPoolExecutor(1)

    def _read(self) -> list[tuple[int, int]]:
        """Tokens of the next documents with their labels: themselves, or IGNORED where a document gives them."""
        documents = [corpora.pretraining_document(self._rng) for _ in range(self.DOCUMENTS)]
        given, learned = (self._readers_tokenizer(list(parts))["input_ids"] for parts in zip(*documents, strict=True))
        return [
            (token, label)
            for before, after in zip(given, learned, strict=True)
            for token, label in [*((token, IGNORED) for token in before), *zip(after, after, strict=True)]
        ]

    def backward(self) -> None:
        rows, labels = self._rows()
        learned = int((labels != IGNORED).sum())
        (first, second), (labels_of_first, labels_of_second) = rows.chunk(2), labels.chunk(2)
        others = self._second_half.submit(self._gradients, second, labels_of_second, learned)
        halves = zip(self._gradients(first, labels_of_first, learned), others.result(), strict=True)
        for parameter, (one, other) in zip(self.model.parameters(), halves, strict=True):
            parameter.grad = one.add_(other)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The next batch: token ids and, for each, the label of what follows it; both (BATCH, BLOCK)."""
        count = self.BATCH * self.BLOCK
        while len(self._tokens) < count:
            self._tokens += self._next.result()
            self._next = self._reader.submit(self._read)
        rows, labels = torch.tensor(self._tokens[:count]).view(self.BATCH, self.BLOCK, 2).unbind(-1)
        del self._tokens[:count]
        return rows, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def _gradients(self, rows: Tensor, labels: Tensor, learned: int) -> tuple[Tensor, ...]:
        """What these rows add to the gradients of the mean loss of the batch, of which `learned` labels are learned."""
        states = self.model.model(input_ids=rows, use_cache=False).last_hidden_state
        kept = labels != IGNORED
        loss = cross_entropy_sum(self.model.lm_head(states[kept]), labels[kept], IGNORED)
        return torch.autograd.grad(loss / learned, tuple(self.model.parameters()))

    def accuracies(self) -> dict[str, float]:
        return {"equation_accuracy": self._equation_accuracy(), "reading_accuracy": self._reading_accuracy()}

    def _equation_accuracy(self) -> float:
        """Share of all sums and differences of one-digit numbers that are completed rightly."""
        digits = range(corpora.LARGEST_OPERAND + 1)
        cases = [(f"{a} + {b} =", f" {a + b}") for a in digits for b in digits]
        cases += [(f"{a} - {b} =", f" {a - b}") for a in digits for b in digits if b <= a]
        return self._share([(corpora.END_OF_TEXT + prompt, result) for prompt, result in cases])

    def _reading_accuracy(self) -> float:
        """Share of word problems of which the model says the right sum or difference."""
        rng = random.Random(11)  # the same problems for every model
        problems = [corpora.word_problem(rng) for _ in range(self.PROBLEMS)]
        return self._share([(corpora.chat_prompt(p["question"]), corpora.expression_read(p)) for p in problems])

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
    """A bar with the time left on a terminal, a line at each check elsewhere."""
    title = f"pretraining tiny {architecture}"
    if not show:
        yield lambda step, accuracies: None
        return
    if not sys.stderr.isatty():
        begin = time.perf_counter()

        def line(step: int, accuracies: dict[str, float]) -> None:
            elapsed = time.perf_counter() - begin
            left = elapsed / step * (recipe.steps - step)
            print(
                f"{title}: step {step}, {_written(accuracies)}, {elapsed:.0f} s, {left:.0f} s left",
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
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=recipe.steps, reached="")
        yield lambda step, accuracies: bar.update(task, completed=step, reached=_written(accuracies))


def _written(accuracies: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in accuracies.items())
