"""A run: one point of a study, every factor resolved to a value; frozen, hashable, with a readable id and a digest."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field

from tunemap.config import (
    EVALUATION_FACTORS,
    BaseMethod,
    DatasetConfig,
    Factors,
    FullMethod,
    GoraMethod,
    LoraMethod,
    ModelConfig,
    PeftMethod,
    QloraMethod,
    Section,
)

RunMethod = Annotated[
    FullMethod | LoraMethod | QloraMethod | GoraMethod | PeftMethod | BaseMethod, Field(discriminator="kind")
]
TaskKind = Literal["generation", "classification"]
TASK_KINDS: dict[str, TaskKind] = {
    "arithmetic": "generation",
    "gsm8k": "generation",
    "generation": "generation",
    "sst2": "classification",
    "classification": "classification",
}


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


class Run(Section):
    """One point of a study. `id` is readable and names folders; digests say whether a result belongs to it."""

    id: str
    model_name: str
    model: ModelConfig
    dataset_name: str
    dataset: DatasetConfig
    method_name: str
    method: RunMethod
    prompt_template: str | None  # the text, not its name in the study
    factors: Factors
    accept_flaws: tuple[str, ...] = ()  # flaws that this run repeats on purpose, whose gates let it through

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read a run from the JSON that `training_spec` or `evaluation_spec` wrote."""
        return cls.model_validate_json(text)

    @property
    def task_kind(self) -> TaskKind:
        """Whether the model generates an answer or chooses a class."""
        return TASK_KINDS[self.dataset.task]

    @property
    def is_base(self) -> bool:
        """Whether this is the row without fine-tuning."""
        return isinstance(self.method, BaseMethod)

    @property  # not cached: a changed copy would carry the values of its original
    def _all(self) -> dict[str, Any]:
        values = self.model_dump(mode="json")
        del values["method"]["factors"]  # already part of `factors`
        return values

    def training_spec(self) -> dict[str, Any]:
        """Everything that training depends on; evaluation factors have their defaults in it."""
        defaults = Factors()
        factors = self._all["factors"] | {name: getattr(defaults, name) for name in EVALUATION_FACTORS}
        return self._all | {"factors": factors}

    def evaluation_spec(self) -> dict[str, Any]:
        """Everything that evaluation depends on, which includes the training."""
        return self._all

    @property
    def training_digest(self) -> str:
        """Digest of what defines the trained weights; names and the id are not part of it."""
        return digest(_without_names(self.training_spec()))

    @property
    def steps_digest(self) -> str:
        """Digest of what defines each step: without how long a run may take, what is kept, and what is let through."""
        spec = _without_names(self.training_spec())
        kept = {
            "factors": {name: value for name, value in spec["factors"].items() if name not in _BOOKKEEPING_FACTORS},
            "dataset": {name: value for name, value in spec["dataset"].items() if name not in _GATE_KEYS},
        }
        return digest({name: value for name, value in spec.items() if name != "accept_flaws"} | kept)

    @property
    def evaluation_digest(self) -> str:
        """Digest of what defines the evaluation."""
        return digest(_without_names(self.evaluation_spec()))

    @property
    def model_key(self) -> str:
        """Folder of the prepared model, shared by all studies that define it alike."""
        return f"{self.model_name}-{digest(self._all['model'])[:8]}"

    @property
    def dataset_key(self) -> str:
        """Folder of the prepared rows, shared by all studies that define the dataset alike."""
        return f"{self.dataset_name}-{digest(self.dataset_spec())[:8]}"

    def dataset_spec(self) -> dict[str, Any]:
        """What the rows depend on: not how they are turned into prompts, nor what is accepted of them."""
        return {key: value for key, value in self._all["dataset"].items() if key not in _TOKEN_KEYS + _GATE_KEYS}

    @property
    def tokens_key(self) -> str:
        """Folder of the tokenised rows."""
        return f"{self.dataset_name}-{self.model_name}-{self.factors.max_length}-{digest(self.tokens_spec())[:8]}"

    def tokens_spec(self) -> dict[str, Any]:
        """What tokenised rows depend on, besides the folders of the model and of the dataset."""
        return {
            "model": self.model_key,
            "dataset": self.dataset_key,
            "max_length": self.factors.max_length,
            "prompt_template": self.prompt_template,
            "system_prompt": self.dataset.system_prompt,
        }


_TOKEN_KEYS = ("prompt_template", "system_prompt")
_GATE_KEYS = ("accept_truncation",)
_BOOKKEEPING_FACTORS = ("time_limit_minutes", "checkpoint_steps", "logging_steps")


def _without_names(spec: dict[str, Any]) -> dict[str, Any]:
    names = ("id", "model_name", "dataset_name", "method_name")
    dataset = {
        key: value for key, value in spec["dataset"].items() if key != "prompt_template"
    }  # its text is beside it
    return {key: value for key, value in spec.items() if key not in names} | {"dataset": dataset}


def differing_factors(first: Run, second: Run) -> dict[str, tuple[Any, Any]]:
    """Every factor in which two runs differ, as `factor: (first, second)`; nested keys are joined by dots."""
    left, right = _flat(first.evaluation_spec()), _flat(second.evaluation_spec())
    return {
        key: (left.get(key), right.get(key))
        for key in dict.fromkeys([*left, *right])
        if key != "id" and left.get(key) != right.get(key)
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, key if not prefix or prefix == "factors" else f"{prefix}.{key}")
    return flat
