"""What a Job that quantizes asks of its node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowbit.api.deploy_quantize import QuantizeWish, quantize_spec
from lowbit.api.effort import with_trained_codes
from lowbit.recipe import preset

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "float16", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def llama_70b(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_70B))
    return file


def test_training_codes_has_room_for_its_state(llama_70b: Path, tmp_path: Path) -> None:
    """12 bytes a weight are saved and one more is the code that came of it; in memory it is 16."""
    recipe, weights = preset("gptq"), 80 * 855_654_400
    specs = []
    for each in (recipe.updated(tune_steps=500), with_trained_codes(recipe)):
        (tmp_path / "recipe.yaml").write_text(each.yaml())
        specs.append(
            quantize_spec(llama_70b, QuantizeWish(methods=(), recipe=tmp_path / "recipe.yaml", claim="models"))
        )
    states = each.tune.self_samples * each.calibration.seq_len * 8192 * 2
    assert specs[1].output_bytes - specs[0].output_bytes == pytest.approx(13 * weights + states, rel=1e-4)


def wish(device: str, **changes: str) -> QuantizeWish:
    return QuantizeWish(methods=("q4_k_m",), device=device, claim="models", changes=changes)


def test_second_order_has_room_for_its_hessians(llama_70b: Path) -> None:
    plain = quantize_spec(llama_70b, wish("cpu"))
    second = quantize_spec(llama_70b, wish("cpu", dataset="pydoc"))
    states = 3 * 128 * 2048 * 8192 * 2
    assert second.memory > plain.memory + 4 * 3 * 28672**2 + states
    assert plain.memory < 10 * 2**30


def test_text_that_was_named_is_calibrated_on(llama_70b: Path) -> None:
    assert "dataset: pydoc" in quantize_spec(llama_70b, wish("cuda", dataset="pydoc")).runs[0].recipe
    assert "dataset: none" in quantize_spec(llama_70b, wish("cuda")).runs[0].recipe
