"""The serialized bitsandbytes checkpoint: NF4, FP4 (with and without double quantization) and LLM.int8().

Stored for a 4 bit layer [out, in], with blocks of `group_size` consecutive columns:
    weight              uint8 [out * in / 2, 1], the first of two columns in the high half
    weight.absmax       float32 [blocks]; uint8 codes with double quantization
    weight.quant_map    float32 [16], the code book
    weight.nested_absmax float32 [ceil(blocks / 256)], weight.nested_quant_map float32 [256]: double quantization only
    weight.quant_state.bitsandbytes__nf4 (or __fp4): the other fields as JSON in uint8; padded with spaces here, since
                        its length otherwise depends on how many digits `nested_offset` prints with
For an int8 layer: `weight` int8 [out, in], `SCB` float32 [out] (127 times the scale), `weight_format` uint8 scalar 0.

Which variant of 4 bit scales is stored is the format's: `bitsandbytes` or `bitsandbytes_double`; a method sees it in
the scale dtype. Sources: bitsandbytes functional.py (QuantState), nn/modules.py; transformers
integrations/bitsandbytes.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.core.codebooks import codebook
from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import FormatError
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.formats.layout import (
    accept,
    exact,
    most_common,
    named,
    require,
    require_multiple,
    require_shape,
    same_numbers,
    skips_by_part,
)

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "weight.quant_state.bitsandbytes__"
LLM_INT8 = Scheme("w8a8", WeightScheme("int", 8, "channel", 0), ActivationScheme("int", 8, "token"))
# Longest decimal that Python prints for a float, with sign and exponent.
_FLOAT_DIGITS = 25


@dataclass(frozen=True)
class BitsAndBytesFormat:
    """double: scales of 4 bit blocks are themselves stored in 8 bits."""

    name: str
    double: bool
    markers: tuple[str, ...] = ("weight.absmax", "SCB")
    suffixes: tuple[str, ...] = (
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *(f"{STATE}nf4", f"{STATE}fp4", "SCB", "weight_format"),
    )

    def refuse(self, scheme: Scheme) -> str | None:
        """NF4 and FP4 weights by block; int8 weights by channel with int8 activations by token (LLM.int8())."""
        weights = scheme.weights
        if weights is not None and weights.kind in ("nf4", "fp4"):
            if scheme.activations is not None:
                return f"{weights.kind} weights go with 16 bit activations: use scheme {weights.kind}"
            if weights.granularity != "group" or weights.group_size not in BLOCK_SIZES:
                return (
                    f"bitsandbytes has blocks of {', '.join(map(str, BLOCK_SIZES))}, not {weights.group_size}: use 64"
                )
            return None
        if weights == LLM_INT8.weights and scheme.activations == LLM_INT8.activations:
            if self.double:
                return "LLM.int8() has no scales to quantize twice: use format 'bitsandbytes'"
            return None
        return (
            "format 'bitsandbytes' holds NF4, FP4 and LLM.int8() only: use scheme nf4, or format 'compressed-tensors'"
        )

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """float32, or uint8 for double quantization."""
        return torch.uint8 if self.double else torch.float32

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Raises FormatError when the block size does not divide the columns: blocks would span rows."""
        weights, (rows, columns) = self._weights(scheme), shape
        if weights.kind == "int":
            return {
                "weight": TensorSpec(torch.int8, shape),
                "SCB": TensorSpec(torch.float32, (rows,)),
                "weight_format": TensorSpec(torch.uint8, ()),
            }
        require_multiple(columns, weights.group_size, "the number of inputs", "is the block size")
        blocks = rows * columns // weights.group_size
        specs = {
            "weight": TensorSpec(torch.uint8, (rows * columns // 2, 1)),
            "weight.absmax": TensorSpec(torch.uint8 if self.double else torch.float32, (blocks,)),
            "weight.quant_map": TensorSpec(torch.float32, (16,)),
        }
        if self.double:
            specs["weight.nested_absmax"] = TensorSpec(torch.float32, (-(-blocks // 256),))
            specs["weight.nested_quant_map"] = TensorSpec(torch.float32, (256,))
        return specs | {f"{STATE}{weights.kind}": TensorSpec(torch.uint8, (self._state_size(weights, shape, dtype),))}

    def encode(self, tensor: QTensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
        """Raises FormatError for what `refuse` and `layout` refuse and for scales of the other variant."""
        self.layout(scheme, tensor.shape, dtype)
        weights = self._weights(scheme)
        if weights.kind == "int":
            return _encode_int8(tensor)
        if tensor.scale.dtype != self.scale_dtype(scheme, dtype):
            raise FormatError(f"format {self.name!r} does not store {tensor.scale.dtype} scales, nothing was stored")
        codes, extra = tensor.codes.flatten(), tensor.extra or {}
        stored = {
            "weight": ((codes[0::2] << 4) | codes[1::2]).unsqueeze(1),
            "weight.absmax": tensor.scale.flatten(),
            "weight.quant_map": codebook(weights.kind),
        }
        if self.double:
            stored["weight.nested_absmax"] = extra["nested_scale"]
            stored["weight.nested_quant_map"] = extra["nested_map"]
        state = self._state(weights, tensor.shape, dtype)
        if self.double:
            state["nested_offset"] = extra["nested_offset"].item()
        size = self._state_size(weights, tensor.shape, dtype)
        text = json.dumps(state).ljust(size).encode()
        return stored | {f"{STATE}{weights.kind}": torch.tensor(list(text), dtype=torch.uint8)}

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        """Raises FormatError also for a code book that is not the scheme's."""
        weights = self._weights(scheme)
        if weights.kind == "int":
            return _decode_int8(tensors)
        state = _read_state(require(tensors, f"{STATE}{weights.kind}", [torch.uint8], 1))
        rows, columns = state["shape"]
        if state["blocksize"] != weights.group_size or columns % weights.group_size:
            raise FormatError(
                f"blocks of {state['blocksize']} do not divide rows of {columns}, which lowbit does not read"
            )
        packed = tensors["weight"].flatten()
        require_shape(packed, (rows * columns // 2,), "'weight'")
        if not torch.equal(require(tensors, "weight.quant_map", [torch.float32], 1), codebook(weights.kind)):
            raise FormatError(f"'weight.quant_map' is not the code book of {weights.kind}")
        scale = require(tensors, "weight.absmax", [torch.uint8 if self.double else torch.float32], 1)
        extra = None
        if self.double:
            extra = {
                "nested_scale": require(tensors, "weight.nested_absmax", [torch.float32], 1),
                "nested_map": require(tensors, "weight.nested_quant_map", [torch.float32], 1),
                "nested_offset": torch.tensor([state["nested_offset"]], dtype=torch.float32),
            }
        codes = torch.stack((packed >> 4, packed & 15), 1).view(rows, columns)
        require_shape(scale, (rows * columns // weights.group_size,), "'weight.absmax'")
        return QTensor(codes, scale.view(rows, -1), weights, extra=extra)

    def dense_shape(
        self, specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], Tensor]
    ) -> tuple[int, int]:
        """(out, in), which 4 bit layers keep in their JSON."""
        if scheme.bits == 8:
            rows, columns = specs["weight"].shape
        else:
            rows, columns = _read_state(read(f"{STATE}{scheme.weights.kind if scheme.weights else ''}"))["shape"]
        return rows, columns

    def quantization_config(
        self, layers: Mapping[str, Scheme], skipped: list[str], dtype: torch.dtype = torch.bfloat16
    ) -> dict[str, Any]:
        """BitsAndBytesConfig's fields; `dtype` is what 4 bit layers compute in. Raises FormatError when layers
        differ."""
        for scheme in layers.values():
            accept(self.refuse(scheme))
        same_numbers(self.name, layers)
        weights = self._weights(most_common(layers))
        config: dict[str, Any] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": weights.kind != "int",
            "load_in_8bit": weights.kind == "int",
            "llm_int8_skip_modules": skips_by_part(layers, skipped),
            "llm_int8_threshold": 6.0,
        }
        if weights.kind != "int":
            config |= {
                "bnb_4bit_quant_type": weights.kind,
                "bnb_4bit_use_double_quant": self.double,
                "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
                "bnb_4bit_quant_storage": "uint8",
            }
        return config

    def schemes(self, quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        """The one scheme (blocks of 64, which is all that `from_pretrained` makes): the stored tensors say who has
        it."""
        if quantization_config.get("load_in_8bit"):
            return lambda module: LLM_INT8
        kind = quantization_config.get("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4") or not quantization_config.get("load_in_4bit"):
            raise FormatError(f"lowbit does not read bitsandbytes checkpoints of type {kind!r}")
        scheme = named(WeightScheme(kind, 4, "group", 64))
        return lambda module: scheme

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """None: everything is in config.json."""
        return {}

    def _weights(self, scheme: Scheme) -> WeightScheme:
        accept(self.refuse(scheme))
        assert scheme.weights is not None
        return scheme.weights

    def _state(self, weights: WeightScheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        state: dict[str, Any] = {"quant_type": weights.kind, "blocksize": weights.group_size}
        state |= {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
        return state | ({"nested_blocksize": 256, "nested_dtype": "float32"} if self.double else {})

    def _state_size(self, weights: WeightScheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
        offset = len(', "nested_offset": ') + _FLOAT_DIGITS if self.double else 0
        return len(json.dumps(self._state(weights, shape, dtype))) + offset


def _read_state(stored: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(stored.tolist()))
        rows, columns = state["shape"]
        return {**state, "shape": (int(rows), int(columns)), "blocksize": int(state["blocksize"])}
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"the quantization state of a bitsandbytes layer is broken: {error}") from error


def _encode_int8(tensor: QTensor) -> dict[str, Tensor]:
    scale = exact(tensor.scale, torch.float32, "a scale").flatten()
    largest = scale * 127
    # 127 times a scale may round; of its neighbours one gives the same scale when it is divided by 127 again.
    for candidate in (largest.nextafter(torch.zeros(())), largest.nextafter(torch.full((), torch.inf))):
        largest = torch.where(largest / 127 == scale, largest, candidate)
    if not torch.equal(largest / 127, scale):
        raise FormatError("a scale is not 1/127 of any float32 number, nothing was stored")
    codes = (tensor.codes.to(torch.int16) - 128).to(torch.int8)
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _decode_int8(tensors: Mapping[str, Tensor]) -> QTensor:
    codes = require(tensors, "weight", [torch.int8], 2)
    largest = require(tensors, "SCB", [torch.float32], 1)
    require_shape(largest, (codes.shape[0],), "'SCB'")
    if int(tensors.get("weight_format", torch.tensor(0))):
        raise FormatError("lowbit reads int8 weights of bitsandbytes in row order only")
    assert LLM_INT8.weights is not None
    return QTensor((codes.to(torch.int16) + 128).to(torch.uint8), (largest / 127).unsqueeze(1), LLM_INT8.weights)


BITSANDBYTES = BitsAndBytesFormat("bitsandbytes", double=False)
BITSANDBYTES_DOUBLE = BitsAndBytesFormat("bitsandbytes_double", double=True)
