"""Schemes: WHICH numbers a linear layer is stored in and multiplied with.

A scheme says nothing about how the numbers are chosen (a method) or laid out on disk (a format).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Kind = Literal["int", "float", "nf4", "fp4", "mxfp4", "nvfp4"]
Granularity = Literal["tensor", "channel", "group", "block"]


@dataclass(frozen=True)
class WeightScheme:
    """Numbers of one weight matrix [out, in].

    kind: "int" is the affine integer grid scale * (code - zero); "float" is float8_e4m3fn times a scale;
        the others name their code book.
    bits: bits of one code.
    granularity: what shares one scale: the tensor, a row ("channel"), `group_size` consecutive columns of a row ("group"),
        or a square of `group_size` rows and columns ("block").
    group_size: columns per scale for "group" and "block", else 0.
    symmetric: the zero point is fixed in the middle of the codes, 2**(bits-1), and is not stored.
    reordered: columns belong to groups by a stored index (act-order that moves groups), not by position.
    """

    kind: Kind = "int"
    bits: int = 4
    granularity: Granularity = "group"
    group_size: int = 128
    symmetric: bool = True
    reordered: bool = False

    def __post_init__(self) -> None:
        if (self.granularity in ("group", "block")) != (self.group_size > 0):
            raise ValueError(f"group_size {self.group_size} contradicts granularity {self.granularity!r}")

    def groups(self, in_features: int) -> int:
        """Number of scales in one row of `in_features` columns."""
        return -(-in_features // self.group_size) if self.group_size else 1

    def columns_per_scale(self, in_features: int) -> int:
        """How many consecutive columns of a row share a scale."""
        return self.group_size or in_features

    @property
    def max_code(self) -> int:
        """Largest unsigned integer code."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """Zero point of a symmetric integer scheme."""
        return int(2 ** (self.bits - 1))

    def with_group_size(self, group_size: int) -> WeightScheme:
        """The same numbers with scales for `group_size` columns; 0 gives one scale a row."""
        granularity: Granularity = "group" if group_size else "channel"
        return replace(self, granularity=granularity, group_size=group_size)


@dataclass(frozen=True)
class ActivationScheme:
    """Numbers that a linear layer's input is rounded to at run time.

    granularity: "token" (a scale for each token), "tensor" (one scale) or "group" (`group_size` channels of a token).
    dynamic: scales are computed at run time; else they come from calibration and are stored.
    """

    kind: Literal["int", "float", "mxfp4", "nvfp4"] = "int"
    bits: int = 8
    granularity: Literal["token", "tensor", "group"] = "token"
    dynamic: bool = True
    group_size: int = 0


@dataclass(frozen=True)
class Scheme:
    """Weights and activations of one linear layer. `weights` None leaves the layer in 16 bits."""

    name: str
    weights: WeightScheme | None
    activations: ActivationScheme | None = None

    @property
    def bits(self) -> int:
        """Bits of one weight code (16 for an unquantized layer)."""
        return self.weights.bits if self.weights else 16


UNQUANTIZED = Scheme("w16a16", None)

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
