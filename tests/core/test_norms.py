"""Fused norms give what transformers' modules give, and stand only where they do."""

import pytest
import torch

from lowbit.core.norms import RootMeanSquareNorm, fuse_norms


def build(model_type: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, vocab_size=100, num_key_value_heads=2, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize(
    ("model_type", "norms"), [("llama", 5), ("qwen3", 9), ("mixtral", 5), ("gemma2", 0), ("phi", 0), ("gpt2", 0)]
)
def test_norms_that_are_root_mean_square_are_fused(model_type: str, norms: int) -> None:
    model = build(model_type)
    ids = torch.randint(1, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        names = [name for name, _ in model.named_parameters()]
        assert fuse_norms(model) == norms
        assert names == [name for name, _ in model.named_parameters()]
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_that_of_transformers(dtype: torch.dtype, grad: bool) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(128, 1e-5).to(dtype)
    theirs.weight.data.uniform_(0.5, 2)
    hidden = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = hidden.clone()
    with torch.set_grad_enabled(grad):
        ours = RootMeanSquareNorm(theirs.weight, 1e-5)(hidden)
    assert ours.dtype == dtype
    assert hidden.equal(before)
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs(hidden))
    else:
        assert (ours != theirs(hidden)).float().mean() < 0.01


def test_a_module_that_only_looks_like_one_is_left() -> None:
    class Centered(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-5

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            centered = hidden - hidden.mean(-1, keepdim=True)
            return self.weight * centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + self.eps)

    model = torch.nn.Sequential(Centered())
    assert fuse_norms(model) == 0
    assert isinstance(model[0], Centered)
