"""Ranks from importances: a module's share of the importance, paid from LoRA's budget of parameters."""

import math
from collections.abc import Mapping

import torch

from tunemap.errors import UserError
from tunemap.methods.gora.settings import ALLOCATIONS
from tunemap.methods.parameters import Shape


def importance(weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """Mean of |W o G| over elements; both out x in. Size-free, and unchanged by W -> cW, G -> G/c."""
    return float((weight.float() * gradient.float()).abs().mean(dtype=torch.float64))


def frobenius_importance(weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """Frobenius norm of W o G; both out x in. Grows with the module's size: for `gora_hpml` only."""
    return float((weight.float() * gradient.float()).double().norm())


def allocate_ranks(
    importances: Mapping[str, float],
    shapes: Mapping[str, Shape],
    *,
    reference_rank: int,
    min_rank: int,
    max_rank: int | None,
    preset: str,
) -> dict[str, int]:
    """A rank per module, from its share a = I / sum(I) of the importance.

    With the feature f (see `ALLOCATIONS`) and the budget b = sum(f) x reference_rank, the rank is b a / f, rounded and
    clipped to [min_rank, max_rank] and to min(in, out). `shapes` gives (out, in). Invariant to a common factor of the
    importances, so to the scale of the loss. UserError where the importances say nothing (all zero, not finite).
    """
    if preset not in ALLOCATIONS:
        raise UserError(f"gora: allocation is {preset!r}; allowed: {', '.join(ALLOCATIONS)}")
    bounds = {name: _rank_bounds(shape, min_rank, max_rank) for name, shape in shapes.items()}
    if preset == "uniform":
        return {name: min(reference_rank, min(shapes[name])) for name in shapes}
    shares = _shares({name: importances[name] for name in shapes})
    if preset == "exact_budget":
        return _exact_budget_ranks(shares, shapes, bounds, reference_rank)
    if preset == "paper":
        features = {name: math.sqrt(rows + columns) for name, (rows, columns) in shapes.items()}
        budget = sum(features.values()) * reference_rank
        # Nine digits first, for the same reason: a half must round alike at every scale.
        raw = {name: round(round(budget * shares[name] / features[name], 9)) for name in shapes}
    else:
        sizes = {name: rows + columns for name, (rows, columns) in shapes.items()}
        total = sum(sizes.values()) * reference_rank
        # The released code rounds the module's part of the budget to whole parameters, then divides with rest.
        raw = {name: round(total * shares[name]) // sizes[name] for name in shapes}
    return {name: min(max(raw[name], low), high) for name, (low, high) in bounds.items()}


def _rank_bounds(shape: Shape, min_rank: int, max_rank: int | None) -> tuple[int, int]:
    high = min(shape) if max_rank is None else min(max_rank, *shape)
    return min(min_rank, high), high


def _shares(importances: Mapping[str, float]) -> dict[str, float]:
    bad = [name for name, value in importances.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"gora: the importance of {bad[0]} is {importances[bad[0]]}; the estimated gradient is not finite"
        )
    total = math.fsum(importances.values())
    if total <= 0:
        raise UserError(
            "gora: every importance is zero, so they allocate no ranks; does the loss depend on the targets?"
        )
    # Twelve digits: the last bits change with the scale of the loss and must not decide between equals.
    return {name: float(f"{value / total:.12g}") for name, value in importances.items()}


def _exact_budget_ranks(
    shares: Mapping[str, float],
    shapes: Mapping[str, Shape],
    bounds: Mapping[str, tuple[int, int]],
    reference_rank: int,
) -> dict[str, int]:
    """Ranks whose parameter count misses LoRA's by less than one rank of the smallest module below its bound."""
    sizes = {name: rows + columns for name, (rows, columns) in shapes.items()}
    budget = sum(sizes.values()) * reference_rank
    ideal = _ranks_that_spend(budget, {name: shares[name] / sizes[name] for name in shapes}, sizes, bounds)
    ranks = {name: max(math.floor(round(ideal[name], 9)), bounds[name][0]) for name in shapes}
    left = budget - sum(ranks[name] * sizes[name] for name in shapes)
    while True:
        fitting = [name for name in shapes if sizes[name] <= left and ranks[name] < bounds[name][1]]
        if not fitting:
            return ranks
        neediest = max(fitting, key=lambda name: (round(ideal[name] - ranks[name], 9), shares[name]))
        ranks[neediest] += 1
        left -= sizes[neediest]


def _ranks_that_spend(
    budget: int,
    slopes: Mapping[str, float],
    sizes: Mapping[str, int],
    bounds: Mapping[str, tuple[int, int]],
) -> dict[str, float]:
    """Real-valued clip(c x slope, bounds) for the one c that spends the budget, by bisection (monotone in c)."""

    def ranks_at(c: float) -> dict[str, float]:
        return {name: min(max(c * slopes[name], float(low)), float(high)) for name, (low, high) in bounds.items()}

    def spent(c: float) -> float:
        return sum(rank * sizes[name] for name, rank in ranks_at(c).items())

    positive = [slope for slope in slopes.values() if slope > 0]
    lower, upper = 0.0, max(high for _, high in bounds.values()) / min(positive)
    for _ in range(200):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if spent(middle) < budget else (lower, middle)
    return ranks_at(upper)
