"""NF4, FP4 (QLoRA, Dettmers et al. 2023) and LLM.int8() (Dettmers et al. 2022): the bitsandbytes library chooses the
codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.contracts import Method, Needs, Quantized
from lowbit.core.errors import RecipeError
from lowbit.core.primitives import stored_scale
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import WeightScheme
from lowbit.core.statistics import InputStatistics


@dataclass(frozen=True)
class BnbOptions:
    """Nothing to choose: the scheme and the format say everything."""


def quantize(
    weight: Tensor,
    statistics: InputStatistics | None,
    scheme: WeightScheme,
    options: BnbOptions,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantized:
    """weight [out, in] -> codes of `scheme` (nf4, fp4, or int by channel).

    scale_dtype uint8 asks for double quantization of 4 bit scales. Raises RecipeError when bitsandbytes is not
    installed or the scheme is not one of its own.
    """
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise RecipeError("method 'bnb' needs the bitsandbytes library", hint="pip install bitsandbytes") from error
    if scheme.kind == "int":
        codes, largest, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        scale = (largest.float() / 127).unsqueeze(1)
        if scale_dtype != torch.float32:  # another format's 16 bit scales: round to nearest for what they can hold
            scale = stored_scale(scale, scale_dtype)
            codes = torch.round(weight / scale).clamp_(-127, 127)
            scale = scale.to(scale_dtype)
        return Quantized(QTensor((codes.to(torch.int16) + 128).to(torch.uint8), scale, scheme))
    if scheme.kind not in ("nf4", "fp4"):
        raise RecipeError(f"method 'bnb' makes nf4, fp4 and int8, not {scheme.kind}", hint="use method rtn or gptq")
    packed, state = functional.quantize_4bit(
        weight.contiguous(),
        blocksize=scheme.group_size,
        compress_statistics=scale_dtype == torch.uint8,
        quant_type=scheme.kind,
    )
    nibbles = packed.flatten()
    codes = torch.stack((nibbles >> 4, nibbles & 15), 1).view(weight.shape)
    extra = None
    if state.nested:
        nested = {"nested_scale": state.state2.absmax, "nested_map": state.state2.code, "nested_offset": state.offset}
        extra = {name: tensor.float().reshape(-1) for name, tensor in nested.items()}
    return Quantized(QTensor(codes, state.absmax.view(weight.shape[0], -1), scheme, extra=extra))


METHOD = Method("bnb", BnbOptions, quantize, needs=lambda options: Needs(), kinds=("nf4", "fp4", "int"))
