"""Which methods of peft cannot keep their adapters in another dtype than the base's, and why; imports nothing.

All other types train in each combination of precision and adapter dtype that a study allows.
"""

from __future__ import annotations

# They hand their numbers to the model's own layers as they are, and without autocast nothing casts them.
UNCAST = ("ADAPTION_PROMPT", "LN_TUNING", "SHADOW")
# Their products take both dtypes at once, and autocast has no common one for two formats of 16 bits.
ONE_HALF = ("LN_TUNING", "LOHA", "OSF", "ROAD", "WAVEFT")
_BASE = {"bf16": "bfloat16", "fp16": "float16", "pure_bf16": "bfloat16"}


def dtype_reason(peft_type: str, adapter_dtype: str, precision: str) -> str | None:
    """What stands against adapters in this dtype under this precision; None where nothing does."""
    base = _BASE.get(precision, adapter_dtype)
    if adapter_dtype == base:
        return None
    if adapter_dtype == "float32" and precision == "pure_bf16" and peft_type in UNCAST:
        return f"{peft_type} gives its numbers to layers in bfloat16, without autocast; use adapter_dtype bfloat16"
    if adapter_dtype != "float32" and peft_type in ONE_HALF:
        return f"{peft_type} cannot compute with {adapter_dtype} beside {base}; use adapter_dtype float32"
    return None
