"""How much memory a model's weights take, by part, on disk and where a runtime computes; and its cache of keys and values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PARTS = (
    ("embeddings", re.compile(r"(embed_tokens|token_embd|wte|wpe|embed_in|word_embeddings)\.")),
    ("head", re.compile(r"^(lm_head|output|embed_out)\.")),
    ("norms", re.compile(r"norm|ln_")),
)


@dataclass(frozen=True)
class Footprint:
    """Bytes. weights: by part (embeddings, head, linears, norms, other) with all scales and zero points; total.
    cache: keys and values of `batch` sequences of `context` tokens, `cache_bits` bits a number."""

    weights: dict[str, int]
    total: int
    cache: int
    context: int
    batch: int
    cache_bits: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(self.__dict__)


def footprint(
    tensors: Mapping[str, int], config: Mapping[str, Any], *, context: int, batch: int, cache_bits: int = 16
) -> Footprint:
    """tensors: stored name -> bytes. config: the model's config.json."""
    weights: Counter[str] = Counter()
    for name, nbytes in tensors.items():
        weights[_part(name)] += nbytes
    return Footprint(
        dict(weights.most_common()),
        sum(weights.values()),
        cache_bytes(config, context=context, batch=batch, bits=cache_bits),
        context,
        batch,
        cache_bits,
    )


def cache_bytes(config: Mapping[str, Any], *, context: int, batch: int, bits: int = 16) -> int:
    """Keys and values of all layers; sliding windows hold no more than their width. 0 where the config does not say."""
    text = config.get("text_config") or config
    layers = int(text.get("num_hidden_layers") or text.get("n_layer") or 0)
    heads = int(text.get("num_attention_heads") or text.get("n_head") or 0)
    hidden = int(text.get("hidden_size") or text.get("n_embd") or 0)
    if not (layers and heads and hidden):
        return 0
    key_heads = int(text.get("num_key_value_heads") or heads)
    width = int(text.get("head_dim") or hidden // heads)
    kinds = text.get("layer_types") or ["full_attention"] * layers
    window = int(text.get("sliding_window") or context)
    tokens = sum(min(context, window) if kind == "sliding_attention" else context for kind in kinds)
    return 2 * tokens * key_heads * width * batch * bits // 8


def _part(name: str) -> str:
    found = next((part for part, pattern in _PARTS if pattern.search(name)), None)
    if found:
        return found
    return "linears" if re.search(r"(layers|blk|h|blocks|block)\.\d+\.", name) else "other"
