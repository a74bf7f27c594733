"""Attention in one order against plain products in float64, and its bits from run to run."""

from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lowbit.core.attention import attention, attention_backward, attention_in_one_order
from lowbit.core.training import reproducible

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BATCH, HEADS, TOKENS, WIDTH = 2, 4, 300, 64
# 300 keys: no multiple of what the kernels align to
MASKS = ("none", "causal", "window", "bias")


def heads(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, count, TOKENS, WIDTH, generator=generator).to(dtype)


def how(kind: str) -> dict[str, Any]:
    near = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    if kind == "window":
        return {"attn_mask": ((near >= 0) & (near < 50))[None, None]}
    if kind == "bias":
        return {"attn_mask": -near.abs()[None, None].float() / 20}
    return {"is_causal": kind == "causal"}


def plainly(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """In float64, by the formula."""
    query, key, value = query.double(), key.double(), value.double()
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if is_causal:
        attn_mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def test_it_is_there_where_it_is_asked_for_and_a_cpu_keeps_its_own() -> None:
    query = heads(HEADS, 0).requires_grad_()
    expected = scaled_dot_product_attention(query, query, query, is_causal=True)
    with attention_in_one_order() as nothing:
        assert nothing is None
    with reproducible():
        with attention_in_one_order() as mode:
            assert isinstance(mode, TorchFunctionMode)
            assert torch.equal(scaled_dot_product_attention(query, query, query, is_causal=True), expected)
        with torch.no_grad(), attention_in_one_order() as nothing:
            assert nothing is None


def test_torch_compile_takes_it_into_one_graph() -> None:
    def squares(query: Tensor) -> Tensor:
        with attention_in_one_order():
            return scaled_dot_product_attention(query, query, query, is_causal=True).square().sum()

    query = heads(HEADS, 0).requires_grad_()
    with reproducible():
        found = torch.compile(squares, backend="eager", fullgraph=True)(query)
    torch.testing.assert_close(found, squares(query))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("kind", MASKS)
def test_gradients_are_those_of_the_formula(kind: str, shared: int, dtype: torch.dtype) -> None:
    parts = [heads(count, seed, dtype) for seed, count in enumerate((HEADS, HEADS // shared, HEADS // shared))]
    seen = heads(HEADS, 3)
    exact = [part.double().requires_grad_() for part in parts]
    expected = plainly(*exact, **how(kind))
    wanted = torch.autograd.grad((expected * seen).sum(), exact)
    ours = [part.cuda().requires_grad_() for part in parts]
    options = how(kind)
    if "attn_mask" in options:
        mask = options["attn_mask"].cuda()
        options["attn_mask"] = mask if mask.dtype == torch.bool else mask.to(dtype)
    with reproducible(), attention_in_one_order():
        found = scaled_dot_product_attention(*ours, **options, enable_gqa=shared > 1)
        gradients = torch.autograd.grad((found * seen.cuda()).sum(), ours)
    close = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        error = (one.detach().cpu().double() - other.detach()).norm() / other.detach().norm()
        assert error.item() <= close


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_bits_every_time(compiled: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    parts = [torch.randn(16, 9, 1024, 64, device="cuda", generator=generator).requires_grad_() for _ in range(3)]

    def squares(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with attention_in_one_order():
            return scaled_dot_product_attention(query, key, value, is_causal=True).square().sum()

    run = torch.compile(squares, dynamic=False) if compiled else squares
    with reproducible(), torch.autocast("cuda", torch.bfloat16):
        first, *others = [torch.autograd.grad(run(*parts), parts) for _ in range(8)]
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_torch_wants_of_an_operation(dtype: torch.dtype) -> None:
    parts = [heads(HEADS, seed, dtype).cuda().requires_grad_() for seed in range(3)]
    library.opcheck(attention, (*parts, True, 0.125), test_utils=("test_schema", "test_faketensor"))
    out, sums = attention(*parts, True, 0.125)
    given = [part.detach() for part in (out, *parts, out, sums)]
    library.opcheck(attention_backward, (*given, True, 0.125), test_utils=("test_schema", "test_faketensor"))
