"""What serving costs depend on, from a config.json or from a GGUF file's metadata: sizes, and what each layer caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.core.errors import CheckpointError

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class CacheLayer:
    """What one layer remembers. elements: numbers for each token (keys and values; MLA: one latent for both).
    window: tokens at most, None for all."""

    elements: int
    window: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model.

    cache: one entry for each layer that caches by token (layers of linear attention and state spaces do not).
    max_context: positions the model was made for, 0 when that is not said.
    experts, experts_used: of a mixture of experts, all and for each token, else 0. itemsize: bytes of a stored weight.
    """

    model_type: str
    blocks: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    cache: tuple[CacheLayer, ...]
    max_context: int = 0
    experts: int = 0
    experts_used: int = 0
    itemsize: int = 2


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """From a config.json. Raises CheckpointError for one without the usual sizes."""
    text: Mapping[str, Any] = config.get("text_config") or config
    blocks = _number(text, "num_hidden_layers", "n_layer", "num_layers")
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    heads = _number(text, "num_attention_heads", "n_head")
    if not (blocks and hidden and heads):
        raise CheckpointError(
            "config.json names no layers, width or heads", hint="give a causal language model's config"
        )
    single = bool(text.get("multi_query")) and not text.get("new_decoder_architecture")  # falcon
    kv_heads = 1 if single else _number(text, "num_key_value_heads", "num_kv_heads") or heads
    head = _number(text, "head_dim") or hidden // heads
    latent = _number(text, "kv_lora_rank")
    elements = latent + _number(text, "qk_rope_head_dim") if latent else 2 * kv_heads * head
    dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype"))
    return ModelShape(
        model_type=str(config.get("model_type", "")),
        blocks=blocks,
        hidden=hidden,
        intermediate=_number(text, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        vocabulary=_number(text, "vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        cache=tuple(CacheLayer(elements, window) for window in _windows(text, blocks)),
        max_context=_number(text, "max_position_embeddings", "n_positions"),
        experts=_number(text, "num_local_experts", "num_experts", "n_routed_experts"),
        experts_used=_number(text, "num_experts_per_tok"),
        itemsize=_ITEM_BYTES.get(dtype, 2),
    )


def shape_of_gguf(metadata: Mapping[str, Any], vocabulary: int = 0) -> ModelShape:
    """From a GGUF file's metadata; vocabulary: rows of the embedding. Raises CheckpointError for a file without a model."""
    arch = str(metadata.get("general.architecture", ""))

    def values(key: str) -> list[int]:
        value = metadata.get(f"{arch}.{key}", 0)
        return [int(item) for item in (value if isinstance(value, list) else [value])]

    def number(key: str) -> int:
        return max(values(key), default=0)

    blocks, hidden, heads = number("block_count"), number("embedding_length"), number("attention.head_count")
    if not (blocks and hidden and heads):
        raise CheckpointError("the file holds no language model: its metadata names no layers, width or heads")
    per_layer = values("attention.head_count_kv")
    kv_heads = max(per_layer) or heads
    width = (number("attention.key_length") or hidden // heads) + (number("attention.value_length") or hidden // heads)
    latent = number("attention.kv_lora_rank")
    each = per_layer if len(per_layer) == blocks else [kv_heads] * blocks
    elements = [latent + number("rope.dimension_count") if latent else count * width for count in each]
    window = number("attention.sliding_window")
    windows = _patterned(blocks, window, _GGUF_PATTERNS.get(arch, 0)) if window else [None] * blocks
    return ModelShape(
        model_type=arch,
        blocks=blocks,
        hidden=hidden,
        intermediate=number("feed_forward_length") or 4 * hidden,
        vocabulary=vocabulary or number("vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        cache=tuple(CacheLayer(size, span) for size, span in zip(elements, windows, strict=True) if size),
        max_context=number("context_length"),
        experts=number("expert_count"),
        experts_used=number("expert_used_count"),
    )


# every n-th layer sees all tokens, the others a window; 1: all layers a window (transformers, configuration_*.py, and
# llama.cpp, src/llama-model.cpp, set_swa_pattern)
_PATTERNS = {
    "gemma2": 2,
    "gemma3_text": 6,
    "gemma3": 6,
    "cohere2": 4,
    "gpt_oss": 2,
    "mistral": 1,
    "mixtral": 1,
    "phi3": 1,
}
_GGUF_PATTERNS = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "gpt-oss": 2, "llama4": 4}


def _windows(text: Mapping[str, Any], blocks: int) -> list[int | None]:
    """For each layer that caches by token: how many at most, None for all."""
    window = _number(text, "sliding_window")
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds:
        spans = {
            "sliding_attention": window or None,
            "chunked_attention": _number(text, "attention_chunk_size") or None,
        }
        return [spans.get(kind) for kind in kinds if "attention" in kind and kind != "linear_attention"]
    if not window or text.get("use_sliding_window") is False:
        return [None] * blocks
    pattern = _number(text, "sliding_window_pattern", "_sliding_window_pattern")
    return _patterned(blocks, window, pattern or _PATTERNS.get(str(text.get("model_type")), 0))


def _patterned(blocks: int, window: int, every: int) -> list[int | None]:
    """A window on all layers but every n-th; every 1: on all; 0 (unknown): on none, which asks for more, not less."""
    if every == 0:
        return [None] * blocks
    return [window if every == 1 or (index + 1) % every else None for index in range(blocks)]


def _number(content: Mapping[str, Any], *names: str) -> int:
    """The first of these that is there and is a number, else 0."""
    found = (content.get(name) for name in names)
    return next((int(value) for value in found if isinstance(value, int | float)), 0)
