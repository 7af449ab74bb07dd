"""Gates on what training did: to the loss, to trained and frozen weights, and alike on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunemap.gates.result import GateResult, gate


@gate(5)
def finite_loss_gate(losses: Sequence[float], first_step: int = 0) -> GateResult:
    """Every loss is a finite number.

    Prevents: timing a model that stopped learning, because NaN is as fast as any number.
    Would have stopped: NYU's default configurations with all labels masked, whose loss is NaN (F02).
    """
    bad = next((step for step, loss in enumerate(losses, first_step) if not math.isfinite(loss)), None)
    if bad is None:
        return GateResult("finite_loss", True, True, f"all {len(losses)} losses are finite numbers")
    return GateResult("finite_loss", False, True, f"loss {losses[bad - first_step]} at step {bad}")


@gate(5)
def gradient_norm_gate(norms: Sequence[float], *, scaled: bool) -> GateResult:
    """The gradient of the trained parameters is finite and above zero at every step (with a scaler: at most steps).

    Prevents: a training step that trains nothing, and one that overflows: clipping to an infinite norm makes NaN of the
    weights, which no loss shows if it is the last step.
    Would have stopped: NYU's default configurations with all labels masked, whose gradients are no numbers (F02).

    A gradient scaler finds its scale by steps that overflow, so that single norms of fp16 may be infinite or NaN.
    """
    sound = sum(1 for norm in norms if norm > 0)
    finite = sum(1 for norm in norms if norm > 0 and math.isfinite(norm))
    passed = bool(norms) and (finite > len(norms) / 2 if scaled else finite == len(norms))
    message = f"gradient norm above zero at {sound} of {len(norms)} steps"
    message += f", finite at {finite}" if scaled or finite < sound else ""
    return GateResult("gradient_norm", passed, True, message)


@gate(5)
def frozen_weights_gate(changed: Sequence[str], frozen: int) -> GateResult:
    """Frozen weights have the same bits after training as before it.

    Prevents: an adapter method that also trains its base, and a resumption that unfreezes what was frozen.
    Would have stopped: NYU's resumed GoRA, in which embeddings and norms become trainable (F24), and an initialisation
    that rewrites the base weights (F26).
    """
    message = f"{len(changed)} of {frozen} frozen tensors changed"
    if changed:
        message += f": {', '.join(changed[:3])}" + (", ..." if len(changed) > 3 else "")
    return GateResult("frozen_weights", not changed, True, message)


@gate(5)
def trained_weights_gate(unchanged: Sequence[str], trained: int) -> GateResult:
    """Every trained tensor changed; it is fatal if none did.

    Prevents: a part that counts as trained and never moves: a detached head, updates lost to rounding.
    Would have stopped: lr 2e-5 on bfloat16 master weights, which loses small updates (F11), and a classification head
    left at its random start (F39).
    """
    message = f"{trained - len(unchanged)} of {trained} trained tensors changed"
    if unchanged:
        message += f"; not {', '.join(unchanged[:3])}" + (", ..." if len(unchanged) > 3 else "")
    return GateResult("trained_weights", not unchanged, len(unchanged) == trained, message)


@gate(6)
def replicas_gate(checksums: Sequence[Sequence[str]], what: str) -> GateResult:
    """Ranks that hold the same tensors hold the same bits; `checksums` are those of the ranks of each replica group.

    Prevents: data-parallel ranks that train models of their own, and methods that choose other ranks per process.
    Would have stopped: GoRA's ranks chosen by each process from its own data (F26), and checkpoints of one rank's
    shards taken for the model (F24).
    """
    apart = [group for group in checksums if len(set(group)) > 1]
    sizes = f"{len(checksums)} group(s) of {max((len(group) for group in checksums), default=0)} ranks"
    message = f"{what} are {'not ' if apart else ''}the same bits on all ranks of {sizes}"
    return GateResult("replicas", not apart, True, message)


@gate(6)
def ranks_disjoint_gate(examples: int, distinct: int) -> GateResult:
    """Within an epoch no example is dealt out twice, to whatever rank.

    Prevents: ranks that train on the same rows, so that a larger world is the same data again.
    Would have stopped: weak scaling whose ranks repeat rows to fill the last batch, losses compared over it (F22).
    """
    message = f"{examples} examples dealt out over ranks and steps of the fullest epoch, {distinct} distinct"
    return GateResult("ranks_disjoint", examples == distinct, True, message)
