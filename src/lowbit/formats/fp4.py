"""4 bit floats as compressed-tensors stores them: `nvfp4-pack-quantized` and `mxfp4-pack-quantized`.

Two E2M1 codes share a byte, the first column in the low half. Source: compressed-tensors, compressors/nvfp4 and mxfp4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import FormatError
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import Scheme
from lowbit.formats.layout import require, require_multiple, require_shape

FP4_SUFFIXES = ("weight_global_scale", "input_global_scale")
# QTensor.extra name -> stored suffix.
_GLOBAL = {"global_scale": "weight_global_scale", "input_global_scale": "input_global_scale"}
# QTensor.extra name -> ModelOpt's inverse of it.
_INVERSE = {"global_scale": "weight_scale_2", "input_global_scale": "input_scale"}


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [out, in] -> uint8 [out, in/2], the first of two columns in the low half."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous()


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def scale_dtype(kind: str) -> torch.dtype:
    """The dtype of a group's scale: E4M3 for nvfp4, a biased exponent for mxfp4."""
    return torch.float8_e4m3fn if kind == "nvfp4" else torch.uint8


def fp4_layout(scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """Raises FormatError unless the group size divides the columns."""
    weights, (rows, columns) = scheme.weights, shape
    assert weights is not None
    require_multiple(columns, weights.group_size, "the number of inputs", f"is the group size of {weights.kind}")
    specs = {
        "weight_packed": TensorSpec(torch.uint8, (rows, columns // 2)),
        "weight_scale": TensorSpec(scale_dtype(weights.kind), (rows, columns // weights.group_size)),
    }
    return specs | {_GLOBAL[name]: TensorSpec(torch.float32, (1,)) for name in _globals(scheme)}


def encode_fp4(tensor: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    """ModelOpt's global scales, which multiply, are stored as their inverses, rounded to float32.

    Raises FormatError when a global scale that the scheme needs is missing, or the scale is not in its dtype.
    """
    assert scheme.weights is not None
    kind, extra = scheme.weights.kind, dict(tensor.extra or {})
    extra |= {name: extra[other].float().reciprocal() for name, other in _INVERSE.items() if other in extra}
    missing = [name for name in _globals(scheme) if name not in extra]
    if missing or tensor.scale.dtype != scale_dtype(kind):
        raise FormatError(
            f"{kind} needs {', '.join(missing) or 'nothing more'} and scales in {scale_dtype(kind)}, not "
            f"{tensor.scale.dtype}; nothing was stored"
        )
    stored = {"weight_packed": pack_nibbles(tensor.codes), "weight_scale": tensor.scale.contiguous()}
    return stored | {_GLOBAL[name]: extra[name].float().reshape(1) for name in _globals(scheme)}


def decode_fp4(tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
    """The inverse of `encode_fp4`. Raises FormatError."""
    assert scheme.weights is not None
    packed = require(tensors, "weight_packed", [torch.uint8], 2)
    scale = require(tensors, "weight_scale", [scale_dtype(scheme.weights.kind)], 2)
    codes = unpack_nibbles(packed)
    require_shape(scale, (codes.shape[0], codes.shape[1] // scheme.weights.group_size), "'weight_scale'")
    extra = {name: require(tensors, _GLOBAL[name], [torch.float32], 1) for name in _globals(scheme)}
    return QTensor(codes, scale, scheme.weights, extra=extra or None)


def _globals(scheme: Scheme) -> list[str]:
    """Names in QTensor.extra of the whole-tensor scales that the scheme needs."""
    if scheme.weights is None or scheme.weights.kind != "nvfp4":
        return []
    return ["global_scale", *(["input_global_scale"] if scheme.activations else [])]
