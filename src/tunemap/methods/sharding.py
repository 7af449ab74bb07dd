"""Which methods of peft cannot be sharded over devices by `fsdp` and `hybrid`, and why; imports nothing.

All other types train under `fsdp` as on one device, losses and saved adapter alike: a test does it with each of them.
"""

from __future__ import annotations

_SHARED = "shares parameters between layers, which belong to no single unit of sharding"
_PROMPT = "looks its prompt up outside of the model's forward pass, where sharded embeddings are not gathered"

UNSHARDABLE: dict[str, str] = {
    "ADALORA": "masks singular values by their place in whole tensors, of which each device has a part",
    "CARTRIDGE": "peft cannot save it from a gathered state",
    "FROD": "peft saves nothing of an adapter whose sparse parameters are sharded",
    "LILY": _SHARED,
    "OSF": "projects gradients against whole matrices, of which each device has a part",
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "PVERA": "peft refuses to save its shared projections from a gathered state",
    "SHADOW": "runs the model's blocks from another module, where their weights are not gathered",
    "TINYLORA": _SHARED,
    "TRAINABLE_TOKENS": "peft saves a part of it where embedding and output layer share their weights",
    "UNILORA": _SHARED,
    "VBLORA": _SHARED,
    "VERA": "peft refuses to save its shared projections from a gathered state",
}
