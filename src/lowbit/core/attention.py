"""Attention on a GPU whose gradients are added up in one order.

PyTorch's fused kernels add a query's gradient up in whatever order their blocks finish, also where deterministic algorithms are
asked for, as long as other operations may be without one (`warn_only`); cuDNN's, which come first on Hopper, know no other way.
Asking without exception is not possible: it wants an environment variable from before the process began, and refuses models
with any operation that has none. So it is asked for here, around two kernels alone: flash attention, and the memory-efficient
one for float32 (aten/src/ATen/native/transformers/cuda/attention_backward.cu, sdp_utils.cpp in PyTorch). Attention with a mask
stays as it is; most models have one only where windows are longer than those of their sliding attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, library
from torch.overrides import TorchFunctionMode

# what the memory-efficient kernel rounds the number of its sums of exponentials up to
_SUMS_ALIGNMENT = 32


def attention_in_one_order() -> AbstractContextManager[object]:
    """Within it scaled_dot_product_attention without a mask, on a GPU, has gradients that are the same bits every time, if
    deterministic algorithms are asked for and gradients are kept. For a module's pass alone: every operation takes longer."""
    wanted = torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled()
    return _InOneOrder() if wanted else nullcontext()


class _InOneOrder(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    plain: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, [batch, heads, tokens, width]; `plain` is that function."""
    width = query.shape[-1]
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    rows = all(one.dim() == 4 and one.shape[-1] == width and one.stride(-1) == 1 for one in (query, key, value))
    plainly = attn_mask is not None or dropout_p > 0 or not rows or width % 8 != 0 or width > 256
    if plainly or not (query.is_cuda and torch.version.hip is None and _has_kernel(query.device, dtype)):
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa:
        key, value = (_for_each_query(one, query.shape[1]) for one in (key, value))
    found: tuple[Tensor, Tensor] = attention(query, key, value, is_causal, width**-0.5 if scale is None else scale)
    return found[0]


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Flash attention in 16 bits, from Ampere on; the other kernel in float32."""
    flashes = dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(device) >= (8, 0)
    return flashes or dtype == torch.float32


def _for_each_query(heads: Tensor, wanted: int) -> Tensor:
    """Every head of [batch, heads, tokens, width] as often as queries share it."""
    batch, count, tokens, width = heads.shape
    return heads[:, :, None].expand(-1, -1, wanted // count, -1, -1).reshape(batch, wanted, tokens, width)


@library.custom_op("lowbit::attention", mutates_args=(), device_types="cuda")
def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(output, logarithms of the sums of exponentials) of [batch, heads, tokens, width] on a GPU; to torch.compile one
    operation."""
    if _flashes(query):
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    else:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
    return found[0].contiguous(), found[1].contiguous()


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = query.shape
    sums = tokens if _flashes(query) else -(-tokens // _SUMS_ALIGNMENT) * _SUMS_ALIGNMENT
    return _like(query), query.new_empty((batch, heads, sums), dtype=torch.float32)


@library.custom_op("lowbit::attention_backward", mutates_args=(), device_types="cuda")
def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given that of `attention`'s output; sums: what it gave besides."""
    unused = query.new_empty(0, dtype=torch.int64)  # the state of random numbers, of which there are none
    with _without_exception():
        if _flashes(query):
            found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                gradient, query, key, value, out, sums, None, None, query.shape[2], key.shape[2], 0.0, causal, unused, unused,
                scale=scale,
            )  # fmt: skip
        else:
            found = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
                gradient, query, key, value, None, out, sums, unused, unused, 0.0, [True, True, True, False], causal,
                scale=scale,
            )  # fmt: skip
    return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()


@attention_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _back(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = attention_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *found, None, None


attention.register_autograd(_back, setup_context=_remember)


def _flashes(query: Tensor) -> bool:
    return query.dtype != torch.float32


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@contextmanager
def _without_exception() -> Iterator[None]:
    """Deterministic algorithms, and no other."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
