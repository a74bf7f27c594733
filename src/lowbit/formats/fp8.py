"""The Hugging Face `fp8` layout of DeepSeek-V3 and its successors: float8_e4m3fn weights with a scale for each block.

Stored for a layer [out, in]: `weight` float8_e4m3fn [out, in] and `weight_scale_inv` float32 [ceil(out/128),
ceil(in/128)], which despite its name is multiplied. Activations are rounded to FP8 at run time, in groups of 128
channels of a token. Also read: one scale for the tensor (`weight_block_size` null), and scales in float8_e8m0fnu or
bfloat16. Sources: transformers integrations/finegrained_fp8.py, vLLM 0.32 quantization/fp8.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import FormatError
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.formats.layout import accept, exact, most_common, named, require, require_shape, same_numbers, skips_by_part

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class FP8Format:
    """Block-scaled FP8 for transformers, vLLM and SGLang."""

    name: str = "fp8"
    markers: tuple[str, ...] = ("weight_scale_inv",)
    suffixes: tuple[str, ...] = ("weight", "weight_scale_inv", "activation_scale")

    def refuse(self, scheme: Scheme) -> str | None:
        """FP8 weights by block, FP8 activations by group at run time."""
        weights, activations = scheme.weights, scheme.activations
        if weights is None or weights.kind != "float" or weights.granularity != "block":
            return "format 'fp8' holds FP8 weights with scales by block: use scheme fp8_block, or 'compressed-tensors'"
        if activations is None or (activations.kind, activations.granularity) != ("float", "group"):
            return "format 'fp8' means FP8 activations by group: use scheme fp8_block, or format 'compressed-tensors'"
        if not activations.dynamic or activations.group_size != weights.group_size:
            return "format 'fp8' has dynamic activations in groups as wide as a block: use scheme fp8_block"
        return None

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """Always float32."""
        return torch.float32

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The last block of a row or column may be smaller."""
        size, (rows, columns) = self._weights(scheme).group_size, shape
        return {
            "weight": TensorSpec(torch.float8_e4m3fn, shape),
            "weight_scale_inv": TensorSpec(torch.float32, (-(-rows // size), -(-columns // size))),
        }

    def encode(self, tensor: QTensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
        """Raises FormatError for what `refuse` refuses."""
        self._weights(scheme)
        return {
            "weight": tensor.codes.contiguous(),
            "weight_scale_inv": exact(tensor.scale, torch.float32, "a scale"),
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        """Scales come back in float32 (bfloat16 and float8_e8m0fnu ones are exact in it)."""
        weights = scheme.weights
        if weights is None:
            raise FormatError("the layer has FP8 weights but the configuration leaves it unquantized")
        codes = require(tensors, "weight", [torch.float8_e4m3fn], 2)
        by_tensor = weights.granularity == "tensor"
        stored = tensors.get("weight_scale_inv")
        if by_tensor and stored is not None and stored.numel() == 1:
            stored = stored.reshape(1, 1)
        scale = require({} if stored is None else {"weight_scale_inv": stored}, "weight_scale_inv", SCALE_DTYPES, 2)
        size, (rows, columns) = weights.group_size, codes.shape
        require_shape(scale, (1, 1) if by_tensor else (-(-rows // size), -(-columns // size)), "'weight_scale_inv'")
        static = tensors.get("activation_scale")
        extra = None if static is None else {"input_scale": static.float().reshape(1)}
        return QTensor(codes, scale.float(), weights, extra=extra)

    def dense_shape(
        self, specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], Tensor]
    ) -> tuple[int, int]:
        """That of the weight itself."""
        rows, columns = specs["weight"].shape
        return rows, columns

    def quantization_config(self, layers: Mapping[str, Scheme], skipped: list[str]) -> dict[str, Any]:
        """Raises FormatError when layers differ, or when leaving one out by name would leave out a quantized one."""
        for scheme in layers.values():
            accept(self.refuse(scheme))
        same_numbers(self.name, layers)
        size = self._weights(most_common(layers)).group_size
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [size, size],
            "modules_to_not_convert": skips_by_part(layers, skipped),
        }

    def schemes(self, quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        """The one scheme: which layers have it, the stored tensors say (DeepSeek's own files name no exceptions)."""
        block = quantization_config.get("weight_block_size")
        static = quantization_config.get("activation_scheme", "dynamic") == "static"
        if block is None:
            weights = WeightScheme("float", 8, "tensor", 0)
            scheme = named(weights, ActivationScheme("float", 8, "tensor" if static else "token", not static))
            return lambda module: scheme
        if not isinstance(block, (list, tuple)) or len(block) != 2 or block[0] != block[1] or static:
            raise FormatError(f"lowbit reads fp8 with square blocks and dynamic activations, not {block!r}")
        weights = WeightScheme("float", 8, "block", int(block[0]))
        scheme = named(weights, ActivationScheme("float", 8, "group", True, int(block[0])))
        return lambda module: scheme

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """None: everything is in config.json."""
        return {}

    def _weights(self, scheme: Scheme) -> WeightScheme:
        accept(self.refuse(scheme))
        assert scheme.weights is not None
        return scheme.weights


FP8 = FP8Format()
