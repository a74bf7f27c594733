"""The awq format: AutoAWQ's GEMM layout.

Stored for a layer [out, in]: `qweight` int32 [in, out/8] and `qzeros` int32 [groups, out/8], where nibble i of word c
holds output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i], zero points as they are; `scales` float16 [groups, out]. A symmetric
layer is stored with zero points of 8, since readers expect zero points (vLLM 0.32 auto_awq.py has uint4 only), and so
reads back asymmetric.

One configuration holds for all layers; `modules_to_not_convert` is matched as part of a module's path.
Sources: AutoAWQ awq/modules/linear/gemm.py and utils/packing_utils.py; vLLM 0.32 quantization/auto_awq.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import FormatError
from lowbit.core.packing import pack_int32, unpack_int32
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import Scheme, WeightScheme
from lowbit.formats.layout import (
    accept,
    exact,
    field,
    most_common,
    named,
    require,
    require_groups,
    require_multiple,
    require_shape,
    same_numbers,
    skips_by_part,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AWQFormat:
    """4 bit integers for AutoAWQ, vLLM and TGI."""

    name: str = "awq"
    markers: tuple[str, ...] = ("qweight",)
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def refuse(self, scheme: Scheme) -> str | None:
        """4 bit integer weights by group or channel, and no activation quantization."""
        weights = scheme.weights
        if weights is None or weights.kind != "int" or weights.bits != 4:
            what = f"{weights.bits} bit {weights.kind}" if weights else "unquantized"
            return f"format 'awq' holds 4 bit integer weights, not {what} ones: use format 'compressed-tensors'"
        if scheme.activations is not None:
            return "format 'awq' cannot say that activations are quantized: use format 'compressed-tensors'"
        if weights.granularity not in ("group", "channel"):
            return f"format 'awq' has scales by group or channel, not by {weights.granularity}: use a group size"
        if weights.reordered:
            return "format 'awq' cannot move columns between groups (desc_act): use the static act-order"
        return None

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """Always float16. vLLM rounds it to the model's dtype: for bfloat16 models choose scales that both hold."""
        return torch.float16

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Raises FormatError when outputs do not fill whole words or inputs whole groups."""
        weights, (rows, columns) = self._weights(scheme), shape
        require_multiple(rows, 8, "the number of outputs", "is how many codes format 'awq' packs into a word")
        require_groups(weights, columns)
        groups = weights.groups(columns)
        return {
            "qweight": TensorSpec(torch.int32, (columns, rows // 8)),
            "qzeros": TensorSpec(torch.int32, (groups, rows // 8)),
            "scales": TensorSpec(torch.float16, (groups, rows)),
        }

    def encode(self, tensor: QTensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
        """Raises FormatError for what `refuse` and `layout` refuse and for scales that float16 would round."""
        self.layout(scheme, tensor.shape, dtype)
        if tensor.group_index is not None:
            raise FormatError("format 'awq' cannot move columns between groups, nothing was stored")
        zero = torch.full_like(tensor.scale, 8, dtype=torch.uint8) if tensor.zero is None else tensor.zero
        return {
            "qweight": _pack(tensor.codes.T),
            "qzeros": _pack(zero.T),
            "scales": exact(tensor.scale.T, torch.float16, "a scale"),
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        """Raises FormatError also for a symmetric scheme whose zero points are not all 8."""
        weights = self._weights(scheme)
        codes = _unpack(require(tensors, "qweight", [torch.int32], 2))
        zero = _unpack(require(tensors, "qzeros", [torch.int32], 2)).T.contiguous()
        scales = require(tensors, "scales", [torch.float16, torch.bfloat16, torch.float32], 2)
        columns, rows = codes.shape
        require_shape(scales, (weights.groups(columns), rows), "'scales'")
        require_shape(zero, (rows, weights.groups(columns)), "'qzeros'")
        if weights.symmetric and bool((zero != weights.middle).any()):
            raise FormatError("a symmetric awq layer has zero points other than 8")
        return QTensor(codes.T.contiguous(), scales.T.contiguous(), weights, None if weights.symmetric else zero)

    def dense_shape(
        self, specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], Tensor]
    ) -> tuple[int, int]:
        """(out, in) from the packed weight alone."""
        columns, words = specs["qweight"].shape
        return words * 8, columns

    def quantization_config(self, layers: Mapping[str, Scheme], skipped: list[str]) -> dict[str, Any]:
        """Raises FormatError when layers differ, or when leaving one out by name would leave out a quantized one."""
        for scheme in layers.values():
            accept(self.refuse(scheme))
        same_numbers(self.name, layers)
        weights = self._weights(most_common(layers))
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": weights.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "lm_head": "lm_head" in layers,
            "modules_to_not_convert": skips_by_part(layers, skipped) or None,
        }

    def schemes(self, quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        """AutoAWQ's own spellings `w_bit` and `q_group_size` are taken too."""
        config = dict(quantization_config)
        config |= {"bits": config.get("bits", config.get("w_bit"))}
        config |= {"group_size": config.get("group_size", config.get("q_group_size"))}
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm" or field(config, "bits", int) != 4:
            raise FormatError(f"lowbit reads awq of 4 bits and version gemm, not {config['bits']} bits, {version!r}")
        weights = WeightScheme(symmetric=False).with_group_size(max(field(config, "group_size", int), 0))
        left_out = field(config, "modules_to_not_convert", list, []) if config.get("modules_to_not_convert") else []

        def scheme_of(module: str) -> Scheme | None:
            return None if any(part in module for part in left_out) else named(weights)

        return scheme_of

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """None: AutoAWQ and vLLM read config.json."""
        return {}

    def _weights(self, scheme: Scheme) -> WeightScheme:
        accept(self.refuse(scheme))
        assert scheme.weights is not None
        return scheme.weights


def _pack(codes: Tensor) -> Tensor:
    """[n, out] -> [n, out/8]: nibble i of a word is its output ORDER[i]."""
    return pack_int32(codes.reshape(codes.shape[0], -1, 8)[:, :, list(ORDER)].flatten(1), 4, 1)


def _unpack(words: Tensor) -> Tensor:
    nibbles = unpack_int32(words, 4, 1, words.shape[1] * 8).reshape(words.shape[0], -1, 8)
    codes = torch.empty_like(nibbles)
    codes[:, :, list(ORDER)] = nibbles
    return codes.flatten(1)


AWQ = AWQFormat()
