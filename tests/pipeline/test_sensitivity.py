"""Predicted divergence of a small change against the divergence that transformers' own model shows."""

from pathlib import Path

import pytest
import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.progress import Silent
from lowbit.core.streamed_model import StreamedModel
from lowbit.methods.kquants import CODECS, decode, encode
from lowbit.methods.kquants.curvature import factor_gram
from lowbit.methods.kquants.second_order import SecondOrderOptions, quantize
from lowbit.pipeline.sensitivity import output_sensitivity, price, price_by_column


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_price_is_the_divergence_of_a_small_change(tiny_llama: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = StreamedModel(open_checkpoint(tiny_llama), torch.device("cpu"), torch.float32)
    windows = torch.randint(0, 512, (24, 64), generator=torch.Generator().manual_seed(0))
    found = output_sensitivity(model, windows, Silent())
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    module = dense.get_submodule(name)
    seen = {}
    module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        before = dense(windows).logits.log_softmax(-1)
        gram = seen["x"].T @ seen["x"] / len(seen["x"])
        weight = module.weight.clone()
        step = weight.abs().amax() / 60
        module.weight.copy_((weight / step).round() * step)
        after = dense(windows).logits.log_softmax(-1)
    measured = (before.exp() * (before - after)).sum(-1).mean().item()
    sensitivity = found.head if name == "lm_head" else found.layers[name]
    assert sensitivity is not None
    assert price(weight, module.weight, gram, sensitivity) == pytest.approx(measured, rel=0.35)


@pytest.mark.parametrize("type_name", ["Q3_K", "Q4_K", "Q6_K"])
def test_price_by_column_is_what_second_order_rounding_leaves(type_name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # inputs as a model's are: some directions hold most of them
    mixed = torch.randn(512, 512, generator=generator) * torch.logspace(0, -1, 512).unsqueeze(1)
    inputs = torch.randn(4096, 512, generator=generator) @ mixed
    gram, weight = inputs.T @ inputs / len(inputs), torch.randn(256, 512, generator=generator) * 0.02
    matters = torch.rand(256, generator=generator)
    curvature = factor_gram(gram)
    nearest = decode(type_name, encode(type_name, weight, curvature.factored.cost), 512)
    predicted = price_by_column(weight, nearest, curvature.factored.cost_in_text(), matters)
    grid, codes = quantize(type_name, weight, curvature, SecondOrderOptions())
    measured = price(weight, CODECS[type_name].dequantize(grid, codes), gram, matters)
    assert predicted == pytest.approx(measured, rel=0.2)
    assert price(weight, nearest, gram, matters) > 2.5 * measured


def test_gradients_are_summed_in_one_order(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU attention's backward pass is another one every time unless it is told; types are chosen by its sums."""
    model = StreamedModel(open_checkpoint(tiny_llama), torch.device("cpu"), torch.float32)
    seen: list[bool] = []
    for name in ("run_block", "logits"):
        inner = getattr(model, name)
        monkeypatch.setattr(
            model,
            name,
            lambda *given, inner=inner: (seen.append(torch.are_deterministic_algorithms_enabled()), inner(*given))[1],
        )
    output_sensitivity(model, torch.zeros(2, 16, dtype=torch.long), Silent())
    assert len(seen) > 4
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
