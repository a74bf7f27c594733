"""A quantized checkpoint read as a dense one: layers are decoded one by one, as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.core.architectures import known_architecture
from lowbit.core.contracts import Checkpoint, TensorSpec
from lowbit.core.errors import CheckpointError, FormatError
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import DTYPES, Scheme
from lowbit.formats import format_of
from lowbit.formats.layout import StoredFormat


class ArtifactCheckpoint:
    """A contracts.Checkpoint with dense names on top of a raw one with stored names.

    `tensors` lists `module.weight` as the model has it ([out, in]; Conv1D: [in, out]) in its dtype for every quantized
    layer, and all other tensors as they are; `config` is the raw one without `quantization_config`, which is kept beside it.
    """

    def __init__(self, raw: Checkpoint, dtype: torch.dtype | None = None) -> None:
        """dtype: of dequantized weights, when not the model's: float32 keeps every stored digit for measuring.

        Raises FormatError for a `quantization_config` or for tensors that lowbit does not read.
        """
        self.raw = raw
        self.location: Path = raw.location
        self.quantization_config: dict[str, Any] = dict(raw.config["quantization_config"])
        self.config = {name: value for name, value in raw.config.items() if name != "quantization_config"}
        self.format: StoredFormat = format_of(self.quantization_config)
        self._stored = self._find_layers()
        scheme_of = self.format.schemes(self.quantization_config)
        self._schemes = {module: self._known(module, scheme_of(module)) for module in self._stored}
        self._dtype = dtype or self._model_dtype()
        architecture = known_architecture(str(raw.config.get("model_type", "")))
        self._transposed = architecture is not None and architecture.transposed
        self._tensors = self._dense_tensors()

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its dense name."""
        return self._tensors

    @property
    def modules(self) -> list[str]:
        """Paths of the quantized layers."""
        return list(self._stored)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, dequantized in float32 and rounded once. Raises CheckpointError or FormatError."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._stored:
            dense = self.qtensor(module).dequantize(self._dtype)
            return dense.T.contiguous() if self._transposed else dense
        if name not in self._tensors:
            raise CheckpointError(f"{self.location} has no tensor {name!r}")
        return self.raw.read(name)

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a layer; None for one that is not quantized."""
        return self._schemes.get(module)

    def qtensor(self, module: str) -> QTensor:
        """The stored numbers of a quantized layer. Raises FormatError, which names the layer."""
        if module not in self._stored:
            raise FormatError(f"{self.location} has no quantized layer {module!r}")
        tensors = {suffix: self.raw.read(name) for suffix, name in self._stored[module].items()}
        try:
            return self.format.decode(tensors, self._schemes[module])
        except FormatError as error:
            raise FormatError(f"{module} in {self.location}: {error.message}", hint=error.hint) from error

    def companions(self) -> dict[str, Path]:
        """Those of the raw checkpoint."""
        return self.raw.companions()

    def identity(self) -> str:
        """That of the raw checkpoint."""
        return self.raw.identity()

    def _find_layers(self) -> dict[str, dict[str, str]]:
        """Module -> suffix -> stored name."""
        names = self.raw.tensors
        modules = (
            name.removesuffix(f".{marker}")
            for name in names
            for marker in self.format.markers
            if name.endswith(f".{marker}")
        )
        return {
            module: {suffix: f"{module}.{suffix}" for suffix in self.format.suffixes if f"{module}.{suffix}" in names}
            for module in dict.fromkeys(modules)
        }

    def _known(self, module: str, scheme: Scheme | None) -> Scheme:
        if scheme is None:
            stored = ", ".join(self._stored[module])
            raise FormatError(f"{module} in {self.location} has {stored}, but quantization_config leaves it out")
        return scheme

    def _model_dtype(self) -> torch.dtype:
        named = str(self.raw.config.get("dtype") or self.raw.config.get("torch_dtype") or "").removeprefix("torch.")
        if named in DTYPES:
            return DTYPES[named]
        taken = {name for names in self._stored.values() for name in names.values()}
        rest = (spec.dtype for name, spec in self.raw.tensors.items() if name not in taken)
        return next((dtype for dtype in rest if dtype in DTYPES.values()), torch.bfloat16)

    def _dense_tensors(self) -> dict[str, TensorSpec]:
        taken = {name for names in self._stored.values() for name in names.values()}
        dense = {name: spec for name, spec in self.raw.tensors.items() if name not in taken}
        for module, names in self._stored.items():
            specs = {suffix: self.raw.tensors[name] for suffix, name in names.items()}
            shape = self.format.dense_shape(specs, self._schemes[module], self._reader(names))
            dense[f"{module}.weight"] = TensorSpec(self._dtype, shape[::-1] if self._transposed else shape)
        return dense

    def _reader(self, names: Mapping[str, str]) -> Callable[[str], Tensor]:
        return lambda suffix: self.raw.read(names[suffix])


def open_artifact(raw: Checkpoint, dtype: torch.dtype | None = None) -> Checkpoint:
    """`raw` read as dense weights: itself when it is not quantized, else an ArtifactCheckpoint. Raises FormatError."""
    return ArtifactCheckpoint(raw, dtype) if raw.config.get("quantization_config") else raw
