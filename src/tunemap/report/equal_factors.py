"""Gate 7: two points are compared only where they differ in what the experiment varies, and all else is equal."""

from __future__ import annotations

from typing import Any

from tunemap.gates import order_gate
from tunemap.report.points import Point, flat_factors, join_list

# Factors that change which examples are trained on, or in which order.
DATA_FACTORS = frozenset(
    {"model", "dataset", "strategy", "gpus", "per_device_batch_size", "gradient_accumulation", "max_length"}
    | {"batching", "max_steps", "epochs"}
)


def unequal_factors(first: Point, second: Point, vary: list[str]) -> tuple[list[str], list[str]]:
    """Gate 7. What else than the varied factors differs: what forbids a comparison, and what must be said with it.

    A factor that a method brings along (its own learning rate) is part of the method; it is allowed and named, unless
    it changes what is trained on: a method that brings its own batch size is not compared.
    Hardware and package versions are factors that nobody wrote down. Speeds of batch 8 and batch 32 side by side
    once passed as a 3.6-fold gain of LoRA.
    """
    left, right = flat_factors(first.planned), flat_factors(second.planned)
    refused: list[str] = []
    named: list[str] = []
    for key in dict.fromkeys([*left, *right]):
        if key in ("seed", *vary) or left.get(key) == right.get(key):
            continue
        if key.startswith("method.") and "method" in vary:
            continue
        text = f"{key} ({_value(left.get(key))} against {_value(right.get(key))})"
        origins = [point.planned.get("provenance", {}).get(key, "") for point in (first, second)]
        brought = "method" in vary and any(origin == "method" or origin.startswith("method ") for origin in origins)
        (named if brought and key not in DATA_FACTORS else refused).append(text)
    for key in ("model", "dataset"):
        if key not in vary and first.planned.get(key) != second.planned.get(key):
            refused.append(f"the definition of {key} {left[key]}")
    refused += _unequal_environments(first, second)
    refused += _unequal_orders(first, second, vary)
    return refused, named


def _value(value: Any) -> str:
    return "none" if value is None else str(join_list(value))


HARDWARE = {"cpu": ("model", "physical_cores"), "gpus": ("name", "memory_bytes", "power_limit_w")}
VERSIONS = ("python", "packages", "cuda")


def fingerprint(environment: dict[str, Any]) -> dict[str, str]:
    """Names and versions of a fingerprint by their place in it; not clocks and loads, which change by the minute."""
    found: dict[str, str] = {}
    for part, keys in HARDWARE.items():
        devices = environment.get(part) or []
        for key in keys:
            values = {str(device.get(key)) for device in (devices if isinstance(devices, list) else [devices])}
            found[f"{part}.{key}"] = " + ".join(sorted(values)) or "none"
    for part in VERSIONS:
        value = environment.get(part)
        found |= {f"{part}.{k}": str(v) for k, v in value.items()} if isinstance(value, dict) else {part: str(value)}
    return found


def _unequal_environments(first: Point, second: Point) -> list[str]:
    """Where the machines or the software of two points differ; nothing where a result has no fingerprint."""
    fingerprints = [fingerprint(result.environment) for result in [*second.ok, *first.ok] if result.environment]
    differing: dict[str, str] = {}
    for this in fingerprints[1:]:
        for key, expected in fingerprints[0].items():
            if this.get(key, "none") != expected:
                differing[key] = f"{key} ({this.get(key, 'none')} against {expected})"
    return list(differing.values())


def _unequal_orders(first: Point, second: Point, vary: list[str]) -> list[str]:
    """Gate 9: with the same seed and data factors, every method sees the same examples in the same order."""
    if DATA_FACTORS & set(vary):
        return []
    orders = [
        {result.planned["factors"].get("seed"): result.measurements.get("data_order_hash") for result in point.ok}
        for point in (first, second)
    ]
    for seed in orders[0].keys() & orders[1].keys():
        one, other = orders[0][seed], orders[1][seed]
        if one and other and not order_gate({"this": one, "other": other}).passed:
            return [f"the order of the training examples of seed {seed} ({one} against {other})"]
    return []
