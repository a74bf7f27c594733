"""What a method, a format and a checkpoint are to the rest of lowbit: shapes of plain objects, no base classes to inherit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import Scheme


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Checkpoint(Protocol):
    """Where weights are read from, lazily, tensor by tensor, under Hugging Face names."""

    location: Path
    config: dict[str, Any]

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by name. Raises nothing: the headers were checked when the checkpoint was opened."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises CheckpointError."""
        ...

    def companions(self) -> dict[str, Path]:
        """Files that belong beside the weights (tokenizer, generation config, chat template): name -> path."""
        ...

    def identity(self) -> str:
        """A hash of names, sizes and headers: the same weights give the same identity, at no reading cost."""
        ...


class Format(Protocol):
    """How the numbers of a quantized layer are stored in a directory of safetensors files."""

    name: str

    def refuse(self, scheme: Scheme) -> str | None:
        """Why this format cannot hold `scheme`, with the nearest scheme or format that works; None if it can."""
        ...

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The stored tensors of one linear layer [out, in] by suffix ("qweight", "weight_scale", ...), exactly as `encode`
        will give them. `dtype` is the model's 16-bit dtype. Known before any calibration, so sizes are exact."""
        ...

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """The dtype that scales of integers are stored in, so that methods choose them among what can be stored."""
        ...

    def encode(self, tensor: QTensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
        """QTensor -> stored tensors by suffix."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        """Stored tensors by suffix -> QTensor; the exact inverse of `encode`. Raises FormatError."""
        ...

    def quantization_config(self, layers: Mapping[str, Scheme], skipped: list[str]) -> dict[str, Any]:
        """The `quantization_config` entry of config.json, for the quantized `layers` (module path -> scheme) and the
        linear layers left in 16 bits. Raises FormatError when one configuration cannot say all of it."""
        ...

    def schemes(self, quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        """The inverse: a function from module path to its scheme (None: not quantized). Raises FormatError."""
        ...

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """Further JSON files that loaders of this format look for: name -> content."""
        ...


@dataclass(frozen=True)
class Needs:
    """What a method wants to be told of a layer's inputs. gram: their Gram matrix. original: also how they differ from the
    inputs that the original model has at that place, which costs a second stream of activations. inputs: only how large
    they are. sample: some of them as they are."""

    gram: bool = False
    original: bool = False
    inputs: bool = False
    sample: bool = False

    @property
    def calibration(self) -> bool:
        """Whether any text has to be run through the model."""
        return self.gram or self.original or self.inputs or self.sample

    def __or__(self, other: Needs) -> Needs:
        """What both together want."""
        return Needs(
            self.gram or other.gram,
            self.original or other.original,
            self.inputs or other.inputs,
            self.sample or other.sample,
        )


@dataclass(frozen=True)
class Quantized:
    """What a method gives back: the numbers, and what a user should know of how they came about."""

    tensor: QTensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A way to choose numbers for one weight matrix, or for several stacked that read the same input.

    quantize(weight [out, in] float32, statistics or None, scheme, options, scale_dtype) -> Quantized.
    options: a frozen dataclass with defaults. needs(options) says which statistics `quantize` is to be given.
    reordered(options) says whether columns will move between groups (`desc_act`), which formats must be able to store.
    kinds, granularities: of the weight schemes that it can choose numbers for. by_row: whether rows are chosen without a
    look at other rows, and cost enough to be shared out among processes. learns: whether blocks are trained
    afterwards, with the fields steps, batch, reach, scale_reach and seed of its options.
    """

    name: str
    options: type[Any]
    quantize: Callable[..., Quantized]
    needs: Callable[[Any], Needs]
    reordered: Callable[[Any], bool] = lambda options: False
    kinds: tuple[str, ...] = ("int",)
    granularities: tuple[str, ...] = ("group", "channel")
    learns: bool = False
    by_row: bool = False
