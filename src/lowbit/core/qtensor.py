"""QTensor: a quantized weight matrix, the one thing that methods return and formats store."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.codebooks import codebook, group_scale
from lowbit.core.primitives import by_column
from lowbit.core.scheme import WeightScheme


@dataclass(frozen=True)
class QTensor:
    """A quantized weight matrix [out, in], before any packing.

    codes: [out, in]. Integer schemes: uint8, unsigned, 0..2**bits-1. "float": float8_e4m3fn.
        Code book schemes (nf4, fp4, mxfp4, nvfp4): uint8 index into the code book.
    scale: [out, groups] ([1, 1] per tensor, [ceil(out/g), ceil(in/g)] for blocks), in the dtype that is stored
        (float16, bfloat16, float32; nvfp4 float8_e4m3fn; mxfp4 uint8, exponents with bias 127; nf4, fp4 also uint8),
        so that what is computed here is what a runtime computes.
    zero: [out, groups] uint8, unsigned zero points; None for a symmetric scheme (2**(bits-1)) and for floats.
    group_index: [in] int32, the group of each column, when it is not `column // group_size` (act-order that moves
        groups).
    scheme: the numbers.
    extra: further stored tensors by name, each of shape [1] unless said: "input_scale" (static activations, the
        model's dtype), "global_scale" (nvfp4, float32: what the group scales are divided by), "input_global_scale"
        (float32, the same for its activations), "weight_scale_2" (nvfp4 of ModelOpt: multiplied instead),
        "pre_quant_scale" [in] (W4A16_AWQ of ModelOpt: inputs are multiplied by it first); for uint8 scales of nf4 and
        fp4 the float32 "nested_map" [256], "nested_scale" [ceil(out * groups / 256)] and "nested_offset".
    """

    codes: Tensor
    scale: Tensor
    scheme: WeightScheme
    zero: Tensor | None = None
    group_index: Tensor | None = None
    extra: dict[str, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    def column_groups(self) -> Tensor:
        """[in] int64: the group of each column."""
        if self.group_index is not None:
            return self.group_index.long()
        columns = self.codes.shape[1]
        return torch.arange(columns, device=self.codes.device) // self.scheme.columns_per_scale(columns)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in] in `dtype`: float32(value of the code) * float32(scale), rounded once at the end.

        The value is code - zero for "int", the code itself for "float", and an entry of the code book for the others.
        A "pre_quant_scale" of the inputs is multiplied in, so that the result applies to plain inputs.
        """
        scale = self._column_scale()
        if self.extra is not None and "pre_quant_scale" in self.extra:
            scale = scale * self.extra["pre_quant_scale"].float()
        if self.scheme.kind == "float":
            return (self.codes.float() * scale).to(dtype)
        if self.scheme.kind != "int":
            return (codebook(self.scheme.kind).to(self.codes.device)[self.codes.int()] * scale).to(dtype)
        zero = self.scheme.middle if self.zero is None else self._by_column(self.zero.float())
        return self.codes.float().sub_(zero).mul_(scale).to(dtype)

    def _column_scale(self) -> Tensor:
        """float32 scales of every element: [out, in], or [1, in] for a tensor's one scale."""
        scale = group_scale(self.scheme.kind, self.scale, self.extra)
        if self.scheme.granularity == "block":
            size, (rows, columns) = self.scheme.group_size, self.shape
            return scale.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :columns]
        return self._by_column(scale)

    def _by_column(self, values: Tensor) -> Tensor:
        """[rows, groups] -> [rows, in]: what each column's group has."""
        columns = self.codes.shape[1]
        even = columns % self.scheme.columns_per_scale(columns) == 0
        return by_column(values, self.column_groups(), consecutive=self.group_index is None and even)

    def to(self, device: torch.device | str) -> QTensor:
        """The same tensor on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        extra = None if self.extra is None else {name: tensor.to(device) for name, tensor in self.extra.items()}
        return QTensor(
            self.codes.to(device), self.scale.to(device), self.scheme, move(self.zero), move(self.group_index), extra
        )
