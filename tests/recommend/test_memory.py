"""The memory model against numbers that others published or that transformers' own cache takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.api.memory import Model, serving_memory
from lowbit.core.errors import FormatError, RecipeError
from lowbit.recommend.memory import (
    Load,
    cache_bytes,
    largest_concurrency,
    largest_context,
    runtimes,
    serving_parts,
)
from lowbit.recommend.shape import shape_of_config, shape_of_gguf
from tests.gguf_files import write_gguf

LLAMA2_7B = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
             "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
LLAMA3_8B = {**LLAMA2_7B, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
DEEPSEEK_V3 = {"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
               "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "intermediate_size": 18432,
               "vocab_size": 129280}  # fmt: skip
MISTRAL = {**LLAMA3_8B, "model_type": "mistral", "sliding_window": 4096}
GEMMA3 = {"model_type": "gemma3_text", "hidden_size": 5376, "num_hidden_layers": 62, "num_attention_heads": 32,
          "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024, "intermediate_size": 21504,
          "vocab_size": 262208}  # fmt: skip
QWEN3_NEXT = {"model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16,
              "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5120, "vocab_size": 151936,
              "layer_types": ["linear_attention"] * 3 + ["full_attention"]}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "context", "expected"),
    [
        (LLAMA2_7B, 4096, 2 * 2**30),  # 512 KiB a token
        (LLAMA3_8B, 8192, 2**30),  # 128 KiB a token
        (DEEPSEEK_V3, 1, 70272),  # DeepSeek's own figure: 70.272 KB a token (arXiv 2505.09343, table 1)
        (MISTRAL, 32768, 512 * 2**20),  # no more than its window of 4,096
        (GEMMA3, 32768, (10 * 32768 + 52 * 1024) * 2 * 16 * 128 * 2),  # one layer in six sees all
        (QWEN3_NEXT, 1024, 1024 * 2 * 2 * 256 * 2),  # one layer in four caches by token
        ({**GEMMA3, "text_config": None, "layer_types": ["full_attention"] * 62}, 2048, 62 * 2048 * 8192),
        ({"model_type": "gemma3", "text_config": GEMMA3}, 512, 62 * 512 * 8192),  # nested, as of multimodal models
    ],
)
def test_cache_of_known_models(config: dict[str, Any], context: int, expected: int) -> None:
    shape = shape_of_config(config)
    assert cache_bytes(shape, Load(context), "transformers") == expected
    assert cache_bytes(shape, Load(context, 3, "fp8"), "transformers") == 3 * expected // 2


def test_cache_is_what_transformers_holds(make_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model(num_key_value_heads=1, head_dim=24)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    with torch.no_grad():
        cache = model(torch.zeros(2, 37, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(Model(folder).shape, Load(37, 2), "transformers") == held


def test_runtimes_allot_in_their_own_steps() -> None:
    shape = shape_of_config(LLAMA3_8B)
    a_token = 128 * 1024
    assert cache_bytes(shape, Load(1000, 2), "vllm") == 2 * 1008 * a_token
    assert cache_bytes(shape, Load(1000, 3), "llama.cpp") == 3072 * a_token
    assert cache_bytes(shape_of_config(MISTRAL), Load(32768, 2), "llama.cpp") == (2 * 4096 + 512) * a_token
    assert cache_bytes(shape, Load(1024, 1, "q8_0"), "llama.cpp") == 1024 * a_token * 34 // 64


def test_a_gguf_file_and_its_checkpoint_cache_alike(tiny_llama: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_llama, tmp_path / "tiny.gguf")
    ours, theirs = Model(file).shape, Model(tiny_llama).shape
    assert (ours.cache, ours.vocabulary, ours.hidden, ours.intermediate, ours.max_context) == (
        theirs.cache,
        theirs.vocabulary,
        theirs.hidden,
        theirs.intermediate,
        theirs.max_context,
    )


def test_gguf_metadata_with_heads_by_layer_and_latent_attention() -> None:
    common = {"x.block_count": 2, "x.embedding_length": 64, "x.attention.head_count": 4, "general.architecture": "x"}
    varied = shape_of_gguf({**common, "x.attention.head_count_kv": [2, 0]})
    assert [layer.elements for layer in varied.cache] == [2 * 2 * 16]
    latent = shape_of_gguf({**common, "x.attention.kv_lora_rank": 32, "x.rope.dimension_count": 8})
    assert [layer.elements for layer in latent.cache] == [40, 40]


def test_the_parts_of_serving(tiny_llama: Path, tmp_path: Path) -> None:
    parts = serving_memory(tiny_llama, "rtn", runtime="vllm", place="cpu", context=128, concurrency=2)
    assert parts.weights == Model(tiny_llama).size("rtn").weights
    assert parts.cache == 2 * 128 * 3 * 2 * 2 * 16 * 2
    assert parts.total == parts.weights + parts.cache + parts.activations + parts.overhead
    reserved = serving_memory(tiny_llama, "rtn", place="cpu", context=128, reserved=2**30)
    assert reserved.total == reserved.weights + 2**30 + reserved.activations + reserved.overhead
    file = write_gguf(tiny_llama, tmp_path / "tiny.gguf")
    assert serving_memory(file, runtime="llama.cpp", place="cpu").weights == Model(file).weights
    with pytest.raises(FormatError, match=r"\.gguf"):
        serving_memory(tiny_llama, runtime="llama.cpp", place="cpu")


def test_wrong_words_are_refused_with_the_right_ones(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'llama\.cpp'"):
        serving_memory(tiny_llama, runtime="llamacpp")
    with pytest.raises(RecipeError, match="does not run on a CPU"):
        serving_memory(tiny_llama, runtime="tensorrt-llm", place="cpu")
    with pytest.raises(RecipeError, match="did you mean 'fp8'"):
        serving_memory(tiny_llama, cache_dtype="fp88")


@pytest.mark.parametrize("runtime", runtimes())
def test_the_largest_that_fits_fits_and_the_next_does_not(runtime: str) -> None:
    shape = shape_of_config({**LLAMA3_8B, "max_position_embeddings": 131072})
    weights, budget = 5 * 10**9, 16 * 2**30

    def total(context: int, concurrency: int) -> int:
        return serving_parts(weights, shape, Load(context, concurrency), runtime, "gpu").total

    context = largest_context(weights, shape, Load(), runtime, "gpu", budget)
    assert total(context, 1) <= budget < total(context + 256, 1)
    concurrency = largest_concurrency(weights, shape, Load(2048), runtime, "gpu", budget)
    assert total(2048, concurrency) <= budget < total(2048, concurrency + 1)
    assert largest_context(weights, shape, Load(), runtime, "gpu", 2**30) == 0
    assert largest_concurrency(weights, shape, Load(), runtime, "gpu", 2**30) == 0
