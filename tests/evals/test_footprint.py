from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lowbit.evals.footprint import cache_bytes, footprint

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_cache_is_what_transformers_keeps(kind: str) -> None:
    config = AutoConfig.for_model(kind, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cache = DynamicCache(config=config)
    model(torch.zeros(3, 20, dtype=torch.long), past_key_values=cache, use_cache=True)
    kept = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert cache_bytes(config.to_dict(), context=20, batch=3) == kept


def test_sliding_windows_hold_their_width() -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "sliding_window": 16,
              "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    assert cache_bytes(config, context=100, batch=1) == 2 * (16 + 100) * 8 * 2
    assert cache_bytes(config, context=100, batch=1, bits=8) == 2 * (16 + 100) * 8
    assert cache_bytes({}, context=10, batch=1) == 0


def test_parts() -> None:
    tensors = {"model.embed_tokens.weight": 100, "model.layers.0.mlp.up_proj.weight_packed": 40, "lm_head.weight": 50,
               "model.layers.0.input_layernorm.weight": 4, "blk.1.attn_q.weight": 7, "output.weight": 6,
               "output_norm.weight": 2, "token_embd.weight": 9, "visual.merger": 1}  # fmt: skip
    found = footprint(tensors, {}, context=1, batch=1)
    assert found.weights == {"embeddings": 109, "head": 56, "linears": 47, "norms": 6, "other": 1}
    assert found.total == sum(tensors.values())
