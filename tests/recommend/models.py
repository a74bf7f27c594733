"""config.json of known models, as their makers publish them (sizes only)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def _llama(
    hidden: int, inner: int, blocks: int, heads: int, keys: int, vocabulary: int, positions: int, **more: Any
) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks,
            "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": vocabulary,
            "max_position_embeddings": positions, "tie_word_embeddings": False, "dtype": "bfloat16", **more}  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096, dtype="float16"),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, 4096, dtype="float16"),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256, 131072),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256, 131072),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, 131072, head_dim=128, tie_word_embeddings=True),
    "qwen2.5-0.5b": _llama(896, 4864, 24, 14, 2, 151936, 32768, model_type="qwen2", tie_word_embeddings=True),
    "mixtral-8x7b": _llama(
        4096, 14336, 32, 32, 8, 32000, 32768, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2
    ),
}


def write_config(folder: Path, name: str) -> Path:
    """A directory with nothing but that model's config.json."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(CONFIGS[name]))
    return target
