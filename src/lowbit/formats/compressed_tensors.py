"""The compressed-tensors format of llm-compressor, vLLM and transformers.

The `compressed-tensors` library (0.19 and later) defines the configuration: it is built and read through its models,
and the library names the compressor of each scheme. What is stored for a layer [out, in]:

    pack-quantized    weight_packed int32 [out, in*bits/32], weight_scale [out, groups], weight_shape int64 [2],
                      weight_zero_point int32 [out*bits/32, groups] when asymmetric; the packed codes are unsigned
    int-quantized     weight int8 [out, in] (code - 128), weight_scale [out, 1] or [1], input_scale [1] when static
    float-quantized,  weight float8_e4m3fn [out, in], weight_scale [out, 1], [1] or [out/128, in/128] for blocks,
    naive-quantized   input_scale [1] when static
    nvfp4-pack-quantized  weight_packed uint8 [out, in/2] (first column in the low half), weight_scale float8_e4m3fn
                      [out, in/16], weight_global_scale float32 [1] that divides it, input_global_scale with activations
    mxfp4-pack-quantized  weight_packed as above, weight_scale uint8 [out, in/32], exponents with bias 127

Scales are in the model's dtype, as the library allocates them. Columns that move between groups (desc_act) cannot be
stored: the library removed `weight_g_idx` and `actorder: group` (0.19, quantization/quant_args.py), as did vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import FormatError
from lowbit.core.packing import pack_int32, packed_size, unpack_int32
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import Scheme, WeightScheme
from lowbit.formats import compressed_tensors_config as settings
from lowbit.formats.fp4 import FP4_SUFFIXES, decode_fp4, encode_fp4, fp4_layout
from lowbit.formats.layout import accept, exact, require, require_groups, require_multiple, require_shape

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class CompressedTensorsFormat:
    """Every kind of layer that the library's compressors hold."""

    name: str = "compressed-tensors"
    markers: tuple[str, ...] = ("weight_scale",)
    suffixes: tuple[str, ...] = (
        *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale"),
        *FP4_SUFFIXES,
    )

    def refuse(self, scheme: Scheme) -> str | None:
        """What the library's compressors and vLLM's readers do not take."""
        return settings.refuse(scheme)

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """The model's dtype; the 4 bit floats have their own scales."""
        kind = self._weights(scheme).kind
        return {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8}.get(kind, dtype)

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Raises FormatError when the group size does not divide the columns."""
        weights, (rows, columns) = self._weights(scheme), shape
        require_groups(weights, columns)
        if weights.kind in ("nvfp4", "mxfp4"):
            return fp4_layout(scheme, shape)
        scale = TensorSpec(dtype, _scale_shape(weights, shape))
        if settings.is_packed(scheme):
            specs = {
                "weight_packed": TensorSpec(torch.int32, (rows, packed_size(columns, weights.bits))),
                "weight_scale": scale,
                "weight_shape": TensorSpec(torch.int64, (2,)),
            }
            if not weights.symmetric:
                zero = (packed_size(rows, weights.bits), weights.groups(columns))
                specs["weight_zero_point"] = TensorSpec(torch.int32, zero)
            return specs
        if weights.granularity == "block":
            require_multiple(
                columns, weights.group_size, "the number of inputs", "is the size of a block in vLLM's kernels"
            )
        stored = torch.int8 if weights.kind == "int" else torch.float8_e4m3fn
        specs = {"weight": TensorSpec(stored, shape), "weight_scale": scale}
        if settings.is_static(scheme):
            specs["input_scale"] = TensorSpec(dtype, (1,))
        return specs

    def encode(self, tensor: QTensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
        """Raises FormatError for what `refuse` and `layout` refuse and for scales that `dtype` would round."""
        self.layout(scheme, tensor.shape, dtype)
        weights = self._weights(scheme)
        if tensor.group_index is not None:
            raise FormatError("compressed-tensors cannot move columns between groups, nothing was stored")
        if weights.kind in ("nvfp4", "mxfp4"):
            return encode_fp4(tensor, scheme)
        scale = exact(tensor.scale, dtype, "a weight scale").reshape(_scale_shape(weights, tensor.shape))
        if settings.is_packed(scheme):
            stored = {
                "weight_packed": pack_int32(tensor.codes, weights.bits, 1),
                "weight_scale": scale,
                "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
            }
            if not weights.symmetric:
                if tensor.zero is None:
                    raise FormatError("an asymmetric layer has no zero points, nothing was stored")
                stored["weight_zero_point"] = pack_int32(tensor.zero, weights.bits, 0)
            return stored
        codes = (tensor.codes.to(torch.int16) - 128).to(torch.int8) if weights.kind == "int" else tensor.codes
        stored = {"weight": codes.contiguous(), "weight_scale": scale}
        if settings.is_static(scheme):
            if tensor.extra is None or "input_scale" not in tensor.extra:
                raise FormatError("static activations need an 'input_scale' from calibration, nothing was stored")
            stored["input_scale"] = exact(tensor.extra["input_scale"], dtype, "an input scale").reshape(1)
        return stored

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        """The layer in the library's numbers: unsigned codes, zero points shifted alike."""
        weights = self._weights(scheme)
        if weights.kind in ("nvfp4", "mxfp4"):
            return decode_fp4(tensors, scheme)
        if settings.is_packed(scheme):
            return _decode_packed(tensors, weights)
        codes = require(tensors, "weight", [torch.int8 if weights.kind == "int" else torch.float8_e4m3fn], 2)
        rows, columns = codes.shape
        scale = _read_scale(tensors, weights, (rows, columns))
        extra = {"input_scale": tensors["input_scale"].reshape(1)} if "input_scale" in tensors else None
        if weights.kind == "int":
            codes = (codes.to(torch.int16) + 128).to(torch.uint8)
        return QTensor(codes, scale, weights, extra=extra)

    def dense_shape(
        self, specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], Tensor]
    ) -> tuple[int, int]:
        """(out, in): of the weight itself, from `weight_shape`, or twice the packed 4 bit floats."""
        if "weight" in specs:
            rows, columns = specs["weight"].shape
        elif "weight_shape" in specs:
            rows, columns = (int(size) for size in read("weight_shape"))
        else:
            rows, columns = specs["weight_packed"].shape[0], specs["weight_packed"].shape[1] * 2
        return rows, columns

    def quantization_config(
        self, layers: Mapping[str, Scheme], skipped: list[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        """One config group for each scheme. With a single one it targets every Linear that `ignore` does not name, else
        each group names its layers. `kv_cache` "fp8" adds the scheme of a static FP8 KV cache."""
        for scheme in layers.values():
            accept(self.refuse(scheme))
        return settings.write(layers, skipped, kv_cache)

    def schemes(self, quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        """Group targets in the library's order of precedence: exact name, regular expression, class."""
        return settings.read(quantization_config)

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """None: everything is in config.json."""
        return {}

    def _weights(self, scheme: Scheme) -> WeightScheme:
        accept(self.refuse(scheme))
        assert scheme.weights is not None
        return scheme.weights


def _scale_shape(weights: WeightScheme, shape: tuple[int, int]) -> tuple[int, ...]:
    rows, columns = shape
    if weights.granularity == "tensor":
        return (1,)
    if weights.granularity == "block":
        return (-(-rows // weights.group_size), -(-columns // weights.group_size))
    return (rows, weights.groups(columns))


def _read_scale(tensors: Mapping[str, Tensor], weights: WeightScheme, shape: tuple[int, int]) -> Tensor:
    """[out, groups], or [1, 1] for a tensor's one scale, which is stored with no or one dimension."""
    scale = tensors.get("weight_scale")
    if scale is None or scale.dtype not in SCALE_DTYPES:
        raise FormatError(f"'weight_scale' is {scale if scale is None else scale.dtype}, not a floating point tensor")
    expected = _scale_shape(weights, shape)
    if weights.granularity == "tensor" and scale.numel() == 1:
        return scale.reshape(1, 1)
    if weights.granularity == "channel" and scale.dim() == 1:
        scale = scale.unsqueeze(1)
    require_shape(scale, expected, "'weight_scale'")
    return scale.contiguous()


def _decode_packed(tensors: Mapping[str, Tensor], weights: WeightScheme) -> QTensor:
    packed = require(tensors, "weight_packed", [torch.int32], 2)
    rows, columns = (int(size) for size in require(tensors, "weight_shape", [torch.int64, torch.int32], 1))
    require_shape(packed, (rows, packed_size(columns, weights.bits)), "'weight_packed'")
    scale = _read_scale(tensors, weights, (rows, columns))
    zero = None
    if not weights.symmetric:
        stored = require(tensors, "weight_zero_point", [torch.int32], 2)
        require_shape(stored, (packed_size(rows, weights.bits), scale.shape[1]), "'weight_zero_point'")
        zero = unpack_int32(stored, weights.bits, 0, rows)
    return QTensor(unpack_int32(packed, weights.bits, 1, columns), scale, weights, zero=zero)


COMPRESSED_TENSORS = CompressedTensorsFormat()
