"""Moving scales changes no logits, whatever the family; checked on whole models in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit.core.architectures import ARCHITECTURES, known_architecture
from lowbit.core.statistics import InputStatistics
from lowbit.transforms.scaling import Place, apply, places, representable, scale_statistics_

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "qwen3": {"head_dim": 16},
}


def build(model_type: str, **changes: Any) -> nn.Module:
    config = AutoConfig.for_model(model_type, **{**SIZES, **OWN.get(model_type, {}), **changes})
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        # norms and biases begin as ones and zeros, which would hide a forgotten one
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
        elif "embed" not in name:
            parameter.data.mul_(5)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 26).reshape(2, 12)).logits


def blocks_of(model: nn.Module) -> Any:
    return model.get_submodule(ARCHITECTURES[model.config.model_type].blocks)


def scaled(model: nn.Module, only: Callable[[Place], bool] = lambda place: True) -> list[Place]:
    """Apply random scales at every place of every block; returns the places of the last block."""
    architecture = ARCHITECTURES[model.config.model_type]
    found: list[Place] = []
    for block in blocks_of(model):
        weights = {name: parameter.data for name, parameter in block.named_parameters()}
        found = [place for place in places(architecture, weights, model.config.to_dict()) if only(place)]
        for place in found:
            apply(weights, place, torch.empty(place.channels).uniform_(0.2, 5))
        block.load_state_dict(weights, strict=False)
    return found


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_logits_stay_whatever_the_scales(model_type: str) -> None:
    model = build(model_type)
    before = logits(model)
    found = scaled(model)
    architecture = known_architecture(model_type)
    assert architecture is not None
    assert {place.source for place in found} == {scaling.source for scaling in architecture.scalings}
    after = logits(model)
    assert (after - before).norm() <= 1e-4 * before.norm()


def test_every_target_column_was_scaled() -> None:
    model = build("llama")
    before = {name: parameter.data.clone() for name, parameter in blocks_of(model)[0].named_parameters()}
    scaled(model)
    after = dict(blocks_of(model)[0].named_parameters())
    for name, tensor in before.items():
        assert not torch.allclose(tensor, after[name].data), name


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_values_to_output_under_grouped_query_attention(kv_heads: int) -> None:
    model = build("llama", num_key_value_heads=kv_heads)
    before = logits(model)
    found = scaled(model, only=lambda place: place.source == "self_attn.v_proj")
    assert [place.repeat for place in found] == [4 // kv_heads]
    assert (logits(model) - before).norm() <= 1e-4 * before.norm()


def test_a_wrong_order_of_heads_would_be_seen() -> None:
    model = build("llama")
    before = logits(model)
    block = blocks_of(model)[0]
    scales = torch.empty(16).uniform_(0.2, 5)
    block.self_attn.v_proj.weight.data.div_(scales[:, None])
    block.self_attn.o_proj.weight.data.mul_(scales.repeat(2))  # heads tiled instead of repeated
    assert (logits(model) - before).norm() > 1e-2 * before.norm()


def test_models_that_normalize_after_adding_keep_their_norms() -> None:
    model = build("opt", do_layer_norm_before=False)
    before = logits(model)
    found = scaled(model)
    assert {place.source for place in found} == {"self_attn.v_proj", "fc1"}
    assert (logits(model) - before).norm() <= 1e-4 * before.norm()


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_representable_scales_divide_a_stored_norm_without_rounding(model_type: str) -> None:
    model = build(model_type).bfloat16()
    weights = {name: parameter.data for name, parameter in blocks_of(model)[0].named_parameters()}
    place = places(ARCHITECTURES[model_type], weights, model.config.to_dict())[0]
    wanted = torch.empty(place.channels).uniform_(0.2, 5)
    scales = representable(weights, place, wanted, torch.bfloat16)
    torch.testing.assert_close(scales, wanted, rtol=0.1, atol=0)
    apply(weights, place, scales)
    stored = weights[f"{place.source}.weight"]
    torch.testing.assert_close(stored.bfloat16().float(), stored, rtol=1e-6, atol=1e-7)


def test_statistics_of_scaled_inputs_are_those_of_a_second_pass() -> None:
    x, scales = torch.randn(200, 24), torch.empty(24).uniform_(0.2, 5)
    first = InputStatistics(24, torch.device("cpu"), cross=True, sample_every=7)
    second = InputStatistics(24, torch.device("cpu"), cross=True, sample_every=7)
    for part in x.split(64):
        first.add(part, part + 1)
        second.add(part / scales, (part + 1) / scales)
    first.finish()
    second.finish()
    scale_statistics_(first, scales)
    for name in ("gram", "cross", "largest", "absolute", "sample"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(second.sample, (x / scales)[::7])
