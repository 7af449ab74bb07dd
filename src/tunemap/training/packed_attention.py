"""Attention of packed rows on a CPU: one document after the other, in place of whole rows under a mask.

Under a mask attention computes every pair of tokens of a row, those of two documents and those above the diagonal too,
and repeats keys and values for every head that shares them. What flash-attn does on a GPU (its variable lengths; Dao
2023, https://arxiv.org/abs/2307.08691), torch's own kernel, called for each document, does on a CPU. As there, all
documents of a micro-batch come in one row, which needs no padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from tunemap.config import Factors
from tunemap.training.failure import UnsupportedRunError

NAME = "sdpa_by_document"
MORE_THAN_ATTENTION = ("position_bias", "cache", "softcap", "s_aux")  # what an architecture may ask of its attention


def by_document(factors: Factors, device_type: str) -> bool:
    """Whether a run attends within each document of its packed rows, and so needs them in one row.

    By `flash_attention_2`, or by `sdpa` on a CPU. With `sdpa` a GPU would have to be waited for to learn where
    documents begin.
    """
    apart = factors.attention == "flash_attention_2" or (factors.attention == "sdpa" and device_type == "cpu")
    return factors.batching == "packed" and apart


def attend_by_document(model: Any) -> None:
    """Let a model that was loaded with `sdpa` attend within each document alone, and make no mask; others stay as is.

    An architecture that does not let its attention be replaced, or cuts rows into chunks, keeps its mask.
    """
    config = model.config
    if config._attn_implementation == "sdpa" and getattr(config, "attention_chunk_size", None) is None:
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, _no_mask)
        model.set_attn_implementation(NAME)


def document_lengths(position_ids: Tensor) -> list[int]:
    """Tokens of each document, in the order of the rows, of positions (B, T) that begin at 0 in each of them."""
    starts = (position_ids.flatten() == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], position_ids.numel()], strict=True)]


def _no_mask(*_: Any, **__: Any) -> None:
    return None


@torch.compiler.disable  # which would compile anew for each batch's documents
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: heads (B, H, T, width), of keys and values maybe fewer; returns (B, T, H, width).

    Raises UnsupportedRunError where a layer asks for more, or does not say where documents begin.
    """
    why_not = [name for name in MORE_THAN_ATTENTION if others.get(name) is not None]
    why_not += ["not causal"] * (is_causal is False)
    if why_not or position_ids is None:
        raise UnsupportedRunError(
            f"{type(module).__name__} cannot attend by document ({', '.join(why_not) or 'no positions'}), as packed "
            "rows do on a CPU with attention sdpa; use attention: eager, or another batching"
        )
    batch, _, tokens, _ = query.shape
    lengths = document_lengths(position_ids.expand(batch, -1))
    attended = []
    for length, *heads in zip(lengths, *(_documents(one, lengths) for one in (query, key, value)), strict=True):
        mask = _window_mask(length, sliding_window, query.device)
        attended.append(_one_document(*heads, mask=mask, dropout=dropout, scaling=scaling))
    return torch.cat([heads[0].transpose(0, 1) for heads in attended]).unflatten(0, (batch, tokens)), None


def _documents(heads: Tensor, lengths: list[int]) -> list[Tensor]:
    """(B, H, T, width) as (1, H, tokens, width) of each document; their gradients are put together in one go."""
    tokens = heads.transpose(1, 2).flatten(0, 1)
    return [part.transpose(0, 1)[None] for part in tokens.split(lengths)]


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which tokens each of a document looks at, (tokens, tokens); None where the window holds all before it."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    back = places[:, None] - places
    return (back >= 0) & (back < window)


def _one_document(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    shared = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=shared
    )
