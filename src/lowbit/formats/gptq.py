"""The gptq format: AutoGPTQ's layout, version 1 (`checkpoint_format: gptq`) and version 2 (`gptq_v2`).

Stored for a layer [out, in]: `qweight` int32 [in*bits/32, out] and `qzeros` int32 [groups, out*bits/32], both packed
least significant bits first; `scales` float16 [groups, out]; `g_idx` int32 [in], the group of each column, always
written. Version 1 stores zero points minus 1 and its readers add 1; version 2 stores them as they are.

Version 1 is written for symmetric schemes only. A zero point of 0 has no version 1 code (0 - 1 wraps, and AutoGPTQ's
packer then overwrites the neighbouring codes), GPTQModel refuses version 1 with `sym: false` unless it wrote it itself
(gptqmodel/models/loader.py), and vLLM 0.32 serves no `sym: false` at all (auto_gptq.py, TYPE_MAP). Such checkpoints of
other tools are read, with stored + 1 taken modulo 2**bits.

Sources: AutoGPTQ auto_gptq/nn_modules/qlinear, GPTQModel gptqmodel/quantization/config.py and utils/model.py, vLLM 0.32
vllm/model_executor/layers/quantization/auto_gptq.py and utils/gptq_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import FormatError
from lowbit.core.packing import pack_int32, packed_size, unpack_int32
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
)

BITS = (2, 3, 4, 8)
# vLLM merges these projections and asks for overrides and exclusions under the merged name.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class GPTQFormat:
    """One version of the layout; `offset` is what is subtracted from zero points when they are stored."""

    name: str
    checkpoint_format: str
    offset: int
    markers: tuple[str, ...] = ("qweight",)
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def refuse(self, scheme: Scheme) -> str | None:
        """Integer weights of 2, 3, 4 or 8 bits, by group or channel, and no activation quantization."""
        weights = scheme.weights
        if weights is None or weights.kind != "int":
            kind = weights.kind if weights else "unquantized"
            return f"format {self.name!r} holds integer weights, not {kind} ones: use format 'compressed-tensors'"
        if scheme.activations is not None:
            return f"format {self.name!r} cannot say that activations are quantized: use format 'compressed-tensors'"
        if weights.bits not in BITS:
            return f"format {self.name!r} holds 2, 3, 4 or 8 bits, not {weights.bits}: use format 'compressed-tensors'"
        if weights.granularity not in ("group", "channel"):
            return (
                f"format {self.name!r} has scales by group or channel, not by {weights.granularity}: use a group size"
            )
        if weights.reordered and weights.granularity == "channel":
            return f"format {self.name!r}: with one scale a row there are no groups to reorder: leave out desc_act"
        if self.offset and not weights.symmetric:
            return (
                "format 'gptq' cannot store every zero point (0 wraps, and GPTQModel refuses sym=False in it): "
                "use format 'gptq_v2', or 'awq' or 'compressed-tensors' for vLLM"
            )
        return None

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """Always float16. vLLM rounds it to the model's dtype: for bfloat16 models choose scales that both hold."""
        return torch.float16

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Raises FormatError when the layer's sizes do not fill whole words or whole groups."""
        weights, (rows, columns) = self._weights(scheme), shape
        word = 32 // weights.bits if 32 % weights.bits == 0 else 32
        reason = f"format {self.name!r} packs into whole words at {weights.bits} bits"
        require_multiple(columns, word, "the number of inputs", reason)
        require_multiple(rows, word, "the number of outputs", reason)
        require_groups(weights, columns)
        groups = weights.groups(columns)
        return {
            "qweight": TensorSpec(torch.int32, (packed_size(columns, weights.bits), rows)),
            "qzeros": TensorSpec(torch.int32, (groups, packed_size(rows, weights.bits))),
            "scales": TensorSpec(torch.float16, (groups, rows)),
            "g_idx": TensorSpec(torch.int32, (columns,)),
        }

    def encode(self, tensor: QTensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
        """Raises FormatError for what `refuse` and `layout` refuse and for scales that float16 would round."""
        self.layout(scheme, tensor.shape, dtype)
        weights = self._weights(scheme)
        if (tensor.group_index is not None) != weights.reordered:
            raise FormatError("a group index and a reordered scheme (desc_act) go together, nothing was stored")
        zero = (
            tensor.zero if tensor.zero is not None else torch.full_like(tensor.scale, weights.middle, dtype=torch.uint8)
        )
        return {
            "qweight": pack_int32(tensor.codes.T, weights.bits, 0),
            "qzeros": pack_int32(zero.T - self.offset, weights.bits, 1),
            "scales": exact(tensor.scale.T, torch.float16, "a scale"),
            "g_idx": tensor.column_groups().to(torch.int32),
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        """Columns follow the stored `g_idx`, as AutoGPTQ's readers do; a missing one means `column // group_size`."""
        weights = scheme.weights
        if weights is None:
            raise FormatError("the layer has packed weights but the configuration leaves it unquantized")
        packed = require(tensors, "qweight", [torch.int32], 2)
        scales = require(tensors, "scales", [torch.float16, torch.bfloat16, torch.float32], 2)
        zeros = require(tensors, "qzeros", [torch.int32], 2)
        rows, columns = packed.shape[1], packed.shape[0] * 32 // weights.bits
        groups = scales.shape[0]
        require_shape(scales, (groups, rows), "'scales'")
        require_shape(zeros, (groups, packed_size(rows, weights.bits)), "'qzeros'")
        plain = torch.arange(columns, dtype=torch.int32) // weights.columns_per_scale(columns)
        index = require(tensors, "g_idx", [torch.int32, torch.int64], 1).int() if "g_idx" in tensors else plain
        require_shape(index, (columns,), "'g_idx'")
        if columns and not 0 <= int(index.min()) <= int(index.max()) < groups:
            raise FormatError(f"'g_idx' names group {int(index.max())}, but there are {groups} groups of scales")
        stored = unpack_int32(zeros, weights.bits, 1, rows).T.contiguous()
        moved = weights.reordered or not torch.equal(index, plain)
        return QTensor(
            codes=unpack_int32(packed, weights.bits, 0, columns).T.contiguous(),
            scale=scales.T.contiguous(),
            scheme=replace(weights, reordered=moved),
            zero=self._zero_points(stored, weights),
            group_index=index if moved else None,
        )

    def dense_shape(
        self, specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], Tensor]
    ) -> tuple[int, int]:
        """(out, in) from the packed weight alone."""
        rows, columns = specs["qweight"].shape
        return columns, rows * 32 // scheme.bits

    def quantization_config(self, layers: Mapping[str, Scheme], skipped: list[str]) -> dict[str, Any]:
        """The scheme of most layers, and GPTQModel's `dynamic` rules for the others; vLLM reads these rules too."""
        for scheme in layers.values():
            accept(self.refuse(scheme))
        base = most_common(layers)
        config = {"quant_method": "gptq", **_fields(self._weights(base)), "checkpoint_format": self.checkpoint_format}
        config["lm_head"] = "lm_head" in layers
        rules: dict[str, dict[str, Any]] = {
            f"-:{pattern}": {} for pattern in _patterns([name for name in skipped if name != "lm_head"])
        }
        for scheme in dict.fromkeys(layers.values()):
            if scheme != base:
                own = [name for name, other in layers.items() if other == scheme]
                rules |= {f"+:{pattern}": _fields(self._weights(scheme)) for pattern in _patterns(own)}
        return config | ({"dynamic": rules} if rules else {})

    def schemes(self, quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        """The scheme that a layer has if it is quantized at all: which ones are, only the stored tensors say."""
        base = {"group_size": 128, "desc_act": False, "sym": True} | dict(quantization_config)
        rules = field(quantization_config, "dynamic", dict, {}) if quantization_config.get("dynamic") else {}
        _scheme(base)

        def scheme_of(module: str) -> Scheme | None:
            for rule, changes in rules.items():
                if re.match(rule[2:] if rule[:2] in ("-:", "+:") else rule, module):
                    return None if rule.startswith("-:") else _scheme(base | dict(changes))
            return _scheme(base)

        return scheme_of

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """`quantize_config.json`, which AutoGPTQ itself and vLLM look for."""
        return {"quantize_config.json": dict(quantization_config)}

    def _weights(self, scheme: Scheme) -> WeightScheme:
        accept(self.refuse(scheme))
        assert scheme.weights is not None
        return scheme.weights

    def _zero_points(self, stored: Tensor, weights: WeightScheme) -> Tensor | None:
        """None for a symmetric scheme: its kernels ignore what is stored, and some writers put version 2 zero points
        under version 1's name (Qwen3.5-27B-GPTQ-Int4), so both are taken."""
        if not weights.symmetric:
            return (stored + self.offset) & weights.max_code
        stray = (stored != weights.middle) & (stored != weights.middle - 1)
        if bool(stray.any()):
            raise FormatError(
                f"the configuration says sym: true, but a stored zero point is {int(stored[stray][0])}",
                hint="set sym to false in quantization_config if the checkpoint is asymmetric",
            )
        return None


def _fields(weights: WeightScheme) -> dict[str, Any]:
    return {
        "bits": weights.bits,
        "group_size": weights.group_size or -1,
        "desc_act": weights.reordered,
        "sym": weights.symmetric,
    }


def _scheme(config: Mapping[str, Any]) -> Scheme:
    bits, group_size = field(config, "bits", int), field(config, "group_size", int)
    if bits not in BITS:
        raise FormatError(f"quantization_config has bits = {bits}; the gptq format holds 2, 3, 4 or 8")
    weights = WeightScheme(
        bits=bits, symmetric=field(config, "sym", bool), reordered=field(config, "desc_act", bool)
    ).with_group_size(max(group_size, 0))
    return named(weights)


def _patterns(names: list[str]) -> list[str]:
    """Regular expressions for module paths, and for the merged projections whose parts are all among them."""
    found, patterns = set(names), [f"^{re.escape(name)}$" for name in names]
    for merged, parts in FUSED.items():
        for name in names:
            parent, _, last = name.rpartition(".")
            if last == parts[0] and all(f"{parent}.{part}" in found for part in parts):
                patterns.append(f"^{re.escape(f'{parent}.{merged}')}$")
    return patterns


GPTQ = GPTQFormat("gptq", "gptq", offset=1)
GPTQ_V2 = GPTQFormat("gptq_v2", "gptq_v2", offset=0)
