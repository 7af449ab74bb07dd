"""Gates on the model that is trained: each factor of the run took effect, seen in the model and not in its settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tunemap.gates.result import GateResult, gate

SMALLEST_DTYPE_SHARE = 0.95  # rotary positions and the like stay in float32 under autocast: under 5 % of a tiny model


@gate(3)
def trainable_parameters_gate(counted: int, closed_form: int) -> GateResult:
    """The trainable parameters of the live model are what the method's formula gives for this architecture.

    Prevents: adapters on other modules than the table says, heads counted twice, 4-bit weights counted as bytes.
    Would have stopped: "LoRA" with 2,179,072 parameters on one GPU and 18,464,768 on another (F01), and QLoRA's
    1,256,450, whose classifier is counted twice (F34).
    """
    message = f"{counted:,} trainable parameters, the method's closed form gives {closed_form:,}"
    return GateResult("trainable_parameters", counted == closed_form, True, message)


@gate(4)
def quantised_layers_gate(packed: int, linear_layers: int, *, asked: bool) -> GateResult:
    """With a 4-bit base every linear layer of the blocks holds packed weights; without one none does.

    Prevents: a method called QLoRA whose base was never quantised, or quantised in part.
    Would have stopped: NYU's QLoRA row, whose published code does not produce its numbers (F07).
    """
    due = linear_layers if asked else 0
    message = f"{packed} of {linear_layers} linear layers of the blocks are in 4 bits, {due} should be"
    return GateResult("quantised_layers", packed == due, True, message)


@gate(4)
def recomputation_gate(computations: int, blocks: int, micro_batches: int, *, asked: bool) -> GateResult:
    """Gradient checkpointing computes each block twice per micro-batch, no checkpointing once; counted as it ran.

    Prevents: a setting that nothing reads, and checkpointing that a library turned on unasked.
    Would have stopped: NYU's "57 % less memory by gradient checkpointing" from code that reads the setting nowhere
    (F07), and Columbia's dequantisation overhead, measured with checkpointing on for QLoRA alone (F39).
    """
    due = blocks * micro_batches * (2 if asked else 1)
    message = (
        f"gradient_checkpointing {'on' if asked else 'off'}: {blocks} blocks were computed {computations} times in "
        f"{micro_batches} micro-batches, {due} were expected"
    )
    return GateResult("recomputation", computations == due, True, message)


@gate(4)
def fsdp_units_gate(units: int, blocks: int, *, sharded: bool) -> GateResult:
    """A sharded model has one unit per transformer block and one for the rest; any other model has none.

    Prevents: one flat unit, which gathers the whole model at once and saves little memory.
    Would have stopped: NYU's FSDP memory and "FSDP loses for PEFT", both of one flat unit (F04).
    """
    due = blocks + 1 if sharded else 0
    message = f"{units} FSDP units for {blocks} transformer blocks, {due} were expected"
    return GateResult("fsdp_units", units == due, True, message)


@gate(4)
def resharding_gate(gathers: int, units: int, micro_batches: int, *, asked: bool) -> GateResult:
    """With `reshard_after_forward` blocks are gathered again for the backward pass, without it nothing is.

    Prevents: FSDP whose memory and traffic belong to the other setting: each unit is gathered once per micro-batch at
    least, and what exceeds that is the second gathering. One device gathers nothing and shows nothing.
    Would have stopped: no published number; a setting that nothing reads, as in F07, is what it is for.
    """
    again = gathers - units * micro_batches
    message = (
        f"reshard_after_forward {'on' if asked else 'off'}: {units} units were gathered {gathers} times in "
        f"{micro_batches} micro-batches, {again} of them again for the backward pass"
    )
    return GateResult("resharding", again > 0 if asked else again == 0, True, message)


@gate(4)
def optimizer_state_gate(found: Collection[str], expected: Collection[str]) -> GateResult:
    """The optimizer's moments have the dtypes that the optimizer is named for.

    Prevents: an "8-bit" optimizer that keeps float32, and states whose dtype nobody knows.
    Would have stopped: calling pure bfloat16 states "mixed precision with 16 bytes per parameter" (F11).
    """
    message = f"optimizer states are {_listed(found)}, expected {_listed(expected)}"
    return GateResult("optimizer_state", set(found) == set(expected), True, message)


@gate(4)
def attention_gate(kernels: Sequence[str], asked: str) -> GateResult:
    """The attention implementation that was asked for is the one that ran.

    Prevents: a silent fallback from a fused kernel to plain products, which is another speed and another memory.
    Would have stopped: "fused kernels" given as the reason for GoRA's speed, in code that has none (F06).
    """
    fused = bool(kernels)
    passed = not fused if asked == "eager" else fused and (asked != "flash_attention_2" or "flash" in kernels[0])
    message = f"attention {asked}: {', '.join(kernels) if fused else 'plain matrix products'} ran"
    return GateResult("attention", passed, asked == "eager", message)


@gate(4)
def causality_gate(reach_forward: float, reach_back: float) -> GateResult:
    """A model for generation looks at no token behind the one that it continues, and at those before it.

    `reach_forward` and `reach_back` are the largest gradients of a position's logits with respect to the embeddings of
    later tokens and of tokens up to its own. Batches do not tell a causal model where padding is, because it cannot see
    it; this is what that rests on.
    Prevents: a model that reads its answer, and one that reads padding: an encoder loaded as a decoder.
    Would have stopped: no published number; a loss that falls to nothing is taken for learning.
    """
    message = (
        f"gradient of a position's logits with respect to later tokens {reach_forward:.3g}, to itself and earlier ones "
        f"{reach_back:.3g}"
    )
    return GateResult("causality", reach_forward == 0 and reach_back > 0, True, message)


@gate(4)
def documents_apart_gate(reach_before: float, reach_within: float) -> GateResult:
    """In packed rows a model looks at no document but the one that it continues.

    `reach_before` and `reach_within` are the largest gradients of a position's logits with respect to the embeddings of
    the document before its own in the row, and of its own.
    Prevents: attention or a recurrent state that does not heed positions that begin again, such as OPT's under a mask.
    Would have stopped: no published number; packed rows then train on answers that follow from other questions.
    """
    message = (
        f"gradient of a position's logits with respect to the document before its own {reach_before:.3g}, to its own "
        f"{reach_within:.3g}"
    )
    return GateResult("documents_apart", reach_before == 0 and reach_within > 0, True, message)


@gate(4)
def adapters_gate(
    layers: Mapping[str, int],
    dtypes: Collection[str],
    asked_dtype: str,
    *,
    others: Collection[str] = (),
    trained_dtype: str = "float32",
    one_class: bool = True,
) -> GateResult:
    """Adapters are layers of peft, one class in LoRA's family, in the dtype asked for; heads are in the precision's.

    `others` are the dtypes of what is trained besides adapters.
    Prevents: comparing methods of the LoRA family through layers of different make, or adapters or heads of another
    dtype.
    Would have stopped: GoRA's "+15 % throughput", which is float32 against bfloat16 adapters in two layer classes
    (F05).
    """
    of_peft = all(name.startswith("peft.") for name in layers) and (len(layers) == 1 or not one_class)
    passed = of_peft and set(dtypes) == {asked_dtype} and set(others) <= {trained_dtype}
    classes = ", ".join(f"{count} × {name}" for name, count in layers.items()) or "no adapter layer"
    message = f"{classes}; adapter weights are {_listed(dtypes)}, adapter_dtype is {asked_dtype}"
    if others:
        message += f"; what is trained besides is {_listed(others)}, the precision asks for {trained_dtype}"
    return GateResult("adapters", passed, True, message)


@gate(4)
def autocast_gate(matmul_flops: Mapping[str, int], asked: str) -> GateResult:
    """Matrix products ran in the dtype of the run's precision, weighted by their FLOPs.

    Prevents: a precision that is set and does not reach the arithmetic.
    Would have stopped: one paper's single-GPU runs with autocast beside distributed runs without it (F11, F12), and
    "bf16 is slower" from runs that changed three more factors (F40).
    """
    total = sum(matmul_flops.values())
    shares = {dtype: flops / total for dtype, flops in sorted(matmul_flops.items())} if total else {}
    described = ", ".join(f"{share:.1%} {dtype}" for dtype, share in shares.items()) or "none seen"
    passed = shares.get(asked, 0.0) >= SMALLEST_DTYPE_SHARE
    return GateResult("autocast", passed, True, f"FLOPs of matrix products: {described}; asked for {asked}")


@gate(4)
def compile_gate(graphs: int, *, asked: bool) -> GateResult:
    """A compiled run has compiled graphs, any other has none.

    Prevents: a compiler that skipped the model without a word.
    Would have stopped: no published number; a setting that nothing reads, as in F07, is what it is for.
    """
    message = f"compile {'on' if asked else 'off'}: {graphs} compiled graphs"
    return GateResult("compile", (graphs > 0) == asked, True, message)


def _listed(values: Collection[str]) -> str:
    return ", ".join(sorted(values)) or "none"
