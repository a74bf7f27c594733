"""FP8 and FP4 rounding against definitions that try every representable value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.core.statistics import InputStatistics
from lowbit.methods.fp4 import Fp4Options
from lowbit.methods.fp4 import quantize as quantize_fp4
from lowbit.methods.fp8 import Fp8Options
from lowbit.methods.fp8 import quantize as quantize_fp8
from lowbit.methods.inputs import with_input_scale
from lowbit.methods.rtn import RtnOptions
from lowbit.methods.rtn import quantize as quantize_int

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E4M3 = E4M3[torch.isfinite(E4M3)]
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(values: Tensor, grid: Tensor) -> Tensor:
    return grid[(values[..., None] - grid).abs().argmin(-1)]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_fp8_codes_are_the_nearest_and_scales_beat_the_maximum(granularity: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 72) * torch.logspace(-3, 0, 40)[:, None]
    scheme = WeightScheme("float", 8, granularity, 32 if granularity == "block" else 0)  # type: ignore[arg-type]
    tensor = quantize_fp8(weight, None, scheme, Fp8Options()).tensor
    expected_shape = {"tensor": (1, 1), "channel": (40, 1), "block": (2, 3)}[granularity]
    assert tuple(tensor.scale.shape) == expected_shape
    scale = tensor.scale
    if granularity == "block":
        scale = scale.repeat_interleave(32, 0)[:40].repeat_interleave(32, 1)[:, :72]
    torch.testing.assert_close(tensor.dequantize(), nearest(weight / scale, E4M3) * scale, rtol=1e-6, atol=0)
    plain = quantize_fp8(weight, None, scheme, Fp8Options(search=1)).tensor
    torch.testing.assert_close(plain.scale.max(), weight.abs().max() / 448)
    searched, taken = ((found.dequantize() - weight).norm() for found in (tensor, plain))
    # a whole tensor has many sizes of weights, so that its grid hardly matters
    assert searched <= taken if granularity == "tensor" else searched < 0.99 * taken


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fp8_scales_are_exact_in_the_stored_dtype(dtype: torch.dtype) -> None:
    tensor = quantize_fp8(torch.randn(8, 64), None, WeightScheme("float", 8, "channel", 0), Fp8Options(), dtype).tensor
    assert tensor.scale.dtype == dtype
    assert torch.isfinite(tensor.dequantize()).all()


def test_fp8_of_zeros_is_zeros() -> None:
    weight = torch.zeros(4, 32)
    assert torch.equal(
        quantize_fp8(weight, None, WeightScheme("float", 8, "channel", 0), Fp8Options()).tensor.dequantize(), weight
    )


@pytest.mark.parametrize(("kind", "group"), [("mxfp4", 32), ("nvfp4", 16)])
def test_fp4_codes_are_the_nearest(kind: str, group: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 96) * torch.logspace(-2, 1, 12)[:, None]
    scheme = WeightScheme(kind, 4, "group", group)  # type: ignore[arg-type]
    tensor = quantize_fp4(weight, None, scheme, Fp4Options()).tensor
    if kind == "mxfp4":
        scale = 2.0 ** (tensor.scale.float() - 127)
    else:
        assert tensor.extra is not None
        scale = tensor.scale.float() / tensor.extra["global_scale"]
    scale = scale.repeat_interleave(group, 1)
    both = torch.cat([E2M1, -E2M1[1:]])
    expected = nearest(weight / scale, both) * scale
    # at a tie both neighbours are as near
    torch.testing.assert_close((tensor.dequantize() - weight).abs(), (expected - weight).abs(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "group"), [("mxfp4", 32), ("nvfp4", 16)])
def test_fp4_scales_do_better_than_the_formats_own_rule(kind: str, group: int) -> None:
    torch.manual_seed(1)
    weight = torch.randn(16, 64)
    scheme = WeightScheme(kind, 4, "group", group)  # type: ignore[arg-type]
    searched = quantize_fp4(weight, None, scheme, Fp4Options()).tensor
    plain = quantize_fp4(weight, None, scheme, Fp4Options(search=False)).tensor
    if kind == "mxfp4":  # OCP: the exponent of the largest weight, less that of 4, the largest power of two in E2M1
        largest = weight.view(16, -1, group).abs().amax(-1)
        assert torch.equal(plain.scale.int(), (torch.floor(torch.log2(largest)) - 2 + 127).int())
        # what is beyond 7 is nearer to 8, and so to twice the scale
        assert torch.equal(searched.scale.int(), (torch.floor(torch.log2(largest * 8 / 7)) - 2 + 127).int())
        assert (searched.scale != plain.scale).any()
    else:
        errors = [(tensor.dequantize() - weight).square().view(16, -1, group).sum(-1) for tensor in (searched, plain)]
        assert (errors[0] <= errors[1] + 1e-6).all()


def test_ties_go_to_the_even_code() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -6.0])
    tensor = quantize_fp4(weight, None, WeightScheme("mxfp4", 4, "group", 32), Fp4Options(search=False)).tensor
    assert tensor.scale.tolist() == [[127]]
    assert tensor.dequantize()[0, :8].tolist() == [0, 1, 1, 2, 2, 4, 4, -6]


def test_input_scales_put_the_largest_input_on_the_largest_code() -> None:
    statistics = InputStatistics(32, torch.device("cpu"), gram=False)
    statistics.add(torch.randn(10, 32).clamp(-2, 2))
    statistics.add(torch.full((1, 32), -7.0))
    int8 = WeightScheme("int", 8, "channel", 0)
    quantized = quantize_int(torch.randn(4, 32), None, int8, RtnOptions())
    for kind, code in (("int", 127), ("float", 448)):
        scheme = Scheme("", int8, ActivationScheme(kind, 8, "tensor", False))  # type: ignore[arg-type]
        extra = with_input_scale(quantized, statistics, scheme, torch.float32).tensor.extra
        assert extra is not None
        assert extra["input_scale"].item() == pytest.approx(7 / code)
    fp4 = Scheme("", int8, ActivationScheme("nvfp4", 4, "group", True, 16))
    extra = with_input_scale(quantized, statistics, fp4, torch.float32).tensor.extra
    assert extra is not None
    assert extra["input_global_scale"].item() == pytest.approx(448 * 6 / 7)
