"""What a member of the GoRA ladder is: its allocation of ranks, its start, its scaling, by name."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from tunemap.errors import UserError

ALLOCATIONS = {
    "paper": "feature sqrt(in + out), nearest rank: the paper's text; the parameter count moves by up to half",
    "official_scripts": "feature in + out, rank rounded down: what the released scripts run",
    "exact_budget": "feature in + out, remainders handed out until no module fits: LoRA's count, for fair timings",
    "uniform": "the reference rank everywhere",
}
INITIALISATIONS = {
    "compress": "A uniform, B the compressed negative gradient: GoRA's warm start",
    "zeros": "A uniform, B = 0: LoRA's start",
    "weight_svd": "leading singular vectors of W moved from W into the adapter: PiSSA, what the published study ran",
}
IMPORTANCES = {
    "mean": "mean |W o G| over elements: the paper's, free of the module's size",
    "frobenius": "Frobenius norm of W o G: grows with the module's size; what the published study ran",
}
ROUTES = {
    "unquantised": "weight gradients of the unquantised model; over a 4-bit base, plan first and quantise afterwards "
    "(the authors' QGoRA)",
    "dequantised": "output gradients x inputs, with weights dequantised for the importance; works on the 4-bit model "
    "itself and keeps QLoRA's memory (ours)",
}


@dataclass(frozen=True)
class GoraSettings:
    """One member of the GoRA ladder; the defaults are the paper's for language models.

    reference_rank: rank of the LoRA whose parameter count is the budget.
    alpha:          LoRA alpha; scaling is alpha / sqrt(own rank), or alpha / reference_rank without `rank_stabilised`.
    min_rank, max_rank: bounds of a module's rank; min(in, out) bounds it in any case; None means no other bound.
    gamma:          norm of the first step relative to the gradient's, used by `compress` only (the paper: 0.05, and
                    0.08 for MetaMathQA to GSM8K).
    learning_rate_ratio: LoRA+ ratio of B's learning rate to A's; 1 is plain.
    seed:           of every module's A and of the random numbers drawn while gradients are estimated.
    """

    allocation: str = "paper"
    initialisation: str = "compress"
    importance: str = "mean"
    reference_rank: int = 8
    alpha: float = 16.0
    min_rank: int = 4
    max_rank: int | None = 32
    gamma: float = 0.05
    rank_stabilised: bool = True
    learning_rate_ratio: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, allowed in (
            ("allocation", ALLOCATIONS),
            ("initialisation", INITIALISATIONS),
            ("importance", IMPORTANCES),
        ):
            if getattr(self, key) not in allowed:
                raise UserError(f"gora: {key} is {getattr(self, key)!r}; allowed: {', '.join(allowed)}")
        if not 1 <= self.min_rank <= self.reference_rank <= (self.max_rank or self.reference_rank):
            raise UserError(
                f"gora: needs 1 <= min_rank <= reference_rank <= max_rank, got min_rank {self.min_rank}, "
                f"reference_rank {self.reference_rank}, max_rank {self.max_rank}"
            )
        if self.alpha <= 0 or self.gamma < 0 or self.learning_rate_ratio <= 0:
            raise UserError(
                f"gora: alpha and learning_rate_ratio must be positive and gamma not negative, got alpha {self.alpha}, "
                f"learning_rate_ratio {self.learning_rate_ratio}, gamma {self.gamma}"
            )
        if self.initialisation == "compress" and not self.rank_stabilised:
            raise UserError("gora: initialisation compress assumes the scaling alpha / sqrt(rank); set rank_stabilised")

    @property
    def needs_gradients(self) -> bool:
        """Whether planning runs the model; plain LoRA and its scalings do not."""
        return self.allocation != "uniform" or self.initialisation == "compress"


_LORA = GoraSettings(allocation="uniform", initialisation="zeros", rank_stabilised=False, learning_rate_ratio=1.0)

METHODS: dict[str, GoraSettings] = {
    "lora": _LORA,
    "rslora": replace(_LORA, rank_stabilised=True),
    "lora+": replace(_LORA, learning_rate_ratio=16.0),
    "rslora+lora+": replace(_LORA, rank_stabilised=True, learning_rate_ratio=16.0),
    "gora": GoraSettings(),
    "gora_official_scripts": GoraSettings(allocation="official_scripts"),
    "gora_exact_budget": GoraSettings(allocation="exact_budget"),
    "gora_ranks_only": GoraSettings(initialisation="zeros"),
    "gora_init_only": GoraSettings(allocation="uniform"),
    # What the published study ran under the name of GoRA: the official parser's defaults, which are PiSSA with
    # size-biased ranks. It also kept adapters in bf16 (its LoRA baseline had fp32) and used 8 estimation batches of 8.
    "gora_hpml": GoraSettings(
        allocation="official_scripts",
        initialisation="weight_svd",
        importance="frobenius",
        reference_rank=16,
        alpha=32.0,
        min_rank=1,
        max_rank=None,
        rank_stabilised=False,
        learning_rate_ratio=1.0,
    ),
}


def method(name: str, **changes: Any) -> GoraSettings:
    """The settings called `name` ("-" and "_" are the same), with some of them changed; UserError if unknown."""
    key = name.replace("-", "_").lower()
    if key not in METHODS:
        raise UserError(f"no method {name!r}; the GoRA ladder has {', '.join(METHODS)}")
    unknown = changes.keys() - asdict(METHODS[key]).keys()
    if unknown:
        raise UserError(
            f"{name}: unknown setting {', '.join(sorted(unknown))}; allowed: {', '.join(asdict(METHODS[key]))}"
        )
    return replace(METHODS[key], **changes)
