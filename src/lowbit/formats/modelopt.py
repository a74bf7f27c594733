"""ModelOpt's unified Hugging Face checkpoint, which TensorRT-LLM (`trtllm-serve DIR`), vLLM and SGLang load.

What is stored for a layer [out, in], by `quant_algo`; all scales but those of blocks are float32:
    FP8                 weight float8_e4m3fn, weight_scale [] and input_scale []
    FP8_PER_CHANNEL_PER_TOKEN  weight float8_e4m3fn, weight_scale [out]
    W4A16_AWQ           weight uint8 [out/2, in], the first of two outputs in the low half, signed; weight_scale
                        [out, in/group]; pre_quant_scale [in] in the model's dtype, which inputs are multiplied by
    NVFP4, W4A16_NVFP4  weight uint8 [out, in/2], the first of two columns in the low half; weight_scale float8_e4m3fn
                        [out, in/16]; weight_scale_2 [], which multiplies; NVFP4 also input_scale []
The configuration stands in hf_quant_config.json and, in other words, in config.json. Layers that ModelOpt merged with a
norm have no `pre_quant_scale`; here a layer whose scaling was merged by a transform gets one of ones.

Source: NVIDIA/Model-Optimizer modelopt/torch/export/{unified_export_hf,quant_utils,convert_hf_config}.py (August 2026).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import FormatError
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.formats.fp4 import pack_nibbles, unpack_nibbles
from lowbit.formats.layout import (
    accept,
    exact,
    most_common,
    named,
    require,
    require_groups,
    require_multiple,
    require_shape,
    same_numbers,
    skips_by_part,
)

FP8_INPUT = ActivationScheme("float", 8, "tensor", False)
FP8_TOKEN = ActivationScheme("float", 8, "token", True)
NVFP4_INPUT = ActivationScheme("nvfp4", 4, "group", True, 16)
NVFP4_WEIGHTS = WeightScheme("nvfp4", 4, "group", 16)


@dataclass(frozen=True)
class ModelOptFormat:
    """One quant_algo for all layers."""

    name: str = "modelopt"
    markers: tuple[str, ...] = ("weight_scale",)
    suffixes: tuple[str, ...] = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")

    def refuse(self, scheme: Scheme) -> str | None:
        """What TensorRT-LLM's unified checkpoints hold: FP8, NVFP4, and 4 bit symmetric integers by group."""
        if _algorithm(scheme) is not None:
            return None
        if scheme.weights is not None and scheme.weights.kind == "int" and scheme.activations is not None:
            return (
                "TensorRT-LLM no longer serves int8 SmoothQuant: use scheme w8a8 in format 'compressed-tensors' on "
                "vLLM, or scheme fp8 in format 'modelopt' on TensorRT-LLM"
            )
        return (
            "format 'modelopt' holds FP8 by tensor with static activations or by channel with dynamic ones, NVFP4, and "
            "symmetric 4 bit integers by group: use scheme fp8, nvfp4 or w4a16"
        )

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """float32, for whatever model; float8_e4m3fn for the blocks of NVFP4."""
        return torch.float8_e4m3fn if self._weights(scheme).kind == "nvfp4" else torch.float32

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Raises FormatError when groups or pairs do not divide the layer."""
        weights, (rows, columns) = self._weights(scheme), shape
        require_groups(weights, columns)
        scalar = TensorSpec(torch.float32, ())
        specs: dict[str, TensorSpec]
        if weights.kind == "int":
            require_multiple(rows, 2, "the number of outputs", "is how many codes format 'modelopt' packs into a byte")
            specs = {
                "weight": TensorSpec(torch.uint8, (rows // 2, columns)),
                "weight_scale": TensorSpec(torch.float32, (rows, weights.groups(columns))),
                "pre_quant_scale": TensorSpec(dtype, (columns,)),
            }
        elif weights.kind == "nvfp4":
            specs = {
                "weight": TensorSpec(torch.uint8, (rows, columns // 2)),
                "weight_scale": TensorSpec(torch.float8_e4m3fn, (rows, weights.groups(columns))),
                "weight_scale_2": scalar,
            }
        else:
            scale = scalar if weights.granularity == "tensor" else TensorSpec(torch.float32, (rows,))
            specs = {"weight": TensorSpec(torch.float8_e4m3fn, shape), "weight_scale": scale}
        return specs | ({"input_scale": scalar} if _has_input_scale(scheme) else {})

    def encode(self, tensor: QTensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
        """An NVFP4 layer whose global scales divide (compressed-tensors) gets their inverses, rounded to float32.

        Raises FormatError for what `refuse` and `layout` refuse and for calibrated scales that are missing.
        """
        self.layout(scheme, tensor.shape, dtype)
        weights, extra = self._weights(scheme), tensor.extra or {}
        if weights.kind == "int":
            ones = torch.ones(tensor.shape[1], dtype=dtype)
            stored = {
                "weight": _pack_rows(tensor.codes),
                "weight_scale": exact(tensor.scale, torch.float32, "a weight scale"),
                "pre_quant_scale": exact(extra.get("pre_quant_scale", ones), dtype, "a pre_quant_scale"),
            }
        elif weights.kind == "nvfp4":
            stored = {
                "weight": pack_nibbles(tensor.codes),
                "weight_scale": tensor.scale.contiguous(),
                "weight_scale_2": _scalar(extra, "weight_scale_2", "global_scale"),
            }
        else:
            shape = () if weights.granularity == "tensor" else (tensor.shape[0],)
            scale = exact(tensor.scale, torch.float32, "a weight scale").reshape(shape)
            stored = {"weight": tensor.codes.contiguous(), "weight_scale": scale}
        if _has_input_scale(scheme):
            stored["input_scale"] = _scalar(extra, "input_scale", "input_global_scale")
        return stored

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        """The group size is that of the stored scales: config.json of ModelOpt does not say it for W4A16_AWQ."""
        weights = self._weights(scheme)
        names = [name for name in ("weight_scale_2", "input_scale") if name in tensors]
        extra = {name: tensors[name].float().reshape(1) for name in names}
        if weights.kind == "float":
            codes = require(tensors, "weight", [torch.float8_e4m3fn], 2)
            scale = require(tensors, "weight_scale", [torch.float32], 0 if weights.granularity == "tensor" else 1)
            return QTensor(codes, scale.reshape(-1, 1), weights, extra=extra or None)
        packed = require(tensors, "weight", [torch.uint8], 2)
        if weights.kind == "nvfp4":
            codes = unpack_nibbles(packed)
            scale = require(tensors, "weight_scale", [torch.float8_e4m3fn], 2)
            require(tensors, "weight_scale_2", [torch.float32], 0)
            require_shape(scale, (codes.shape[0], weights.groups(codes.shape[1])), "'weight_scale'")
            return QTensor(codes, scale, weights, extra=extra)
        codes, scale = _unpack_rows(packed), require(tensors, "weight_scale", [torch.float32], 2)
        if scale.shape[0] != codes.shape[0] or codes.shape[1] % scale.shape[1]:
            require_shape(scale, (codes.shape[0], weights.groups(codes.shape[1])), "'weight_scale'")
        inputs = tensors.get("pre_quant_scale")
        if inputs is not None and bool((inputs != 1).any()):
            require_shape(inputs, (codes.shape[1],), "'pre_quant_scale'")
            extra["pre_quant_scale"] = inputs
        weights = replace(weights, group_size=codes.shape[1] // scale.shape[1])
        return QTensor(codes, scale, weights, extra=extra or None)

    def dense_shape(
        self, specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], Tensor]
    ) -> tuple[int, int]:
        """(out, in): pairs of outputs share a byte in W4A16_AWQ, pairs of inputs in NVFP4."""
        rows, columns = specs["weight"].shape
        kind = scheme.weights.kind if scheme.weights else ""
        return rows * (2 if kind == "int" else 1), columns * (2 if kind == "nvfp4" else 1)

    def quantization_config(
        self, layers: Mapping[str, Scheme], skipped: list[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        """`kv_cache` "fp8" is for checkpoints that store `k_proj.k_scale` and `v_proj.v_scale`.

        Raises FormatError when layers differ, or when leaving one out by name would leave out a quantized one.
        """
        for scheme in layers.values():
            accept(self.refuse(scheme))
        same_numbers(self.name, layers)
        scheme = most_common(layers)
        config: dict[str, Any] = {
            "quant_method": "modelopt",
            "quant_algo": _algorithm(scheme),
            "config_groups": {"group_0": _group(scheme)},
            "ignore": skips_by_part(layers, skipped),
            "producer": _producer(),
        }
        if kv_cache not in (None, "fp8"):
            raise FormatError(f"format 'modelopt' has no {kv_cache!r} KV cache", hint="use fp8")
        return config | ({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if kv_cache else {})

    def schemes(self, quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        """`ignore` holds names and wildcards. Raises FormatError for algorithms (mixed too) that are not read."""
        algorithm = quantization_config.get("quant_algo")
        groups = quantization_config.get("config_groups") or {}
        size = next((group.get("weights", {}).get("group_size") for group in groups.values()), None)
        known = {
            "FP8": named(WeightScheme("float", 8, "tensor", 0), FP8_INPUT),
            "FP8_PER_CHANNEL_PER_TOKEN": named(WeightScheme("float", 8, "channel", 0), FP8_TOKEN),
            "NVFP4": named(NVFP4_WEIGHTS, NVFP4_INPUT),
            "W4A16_NVFP4": named(NVFP4_WEIGHTS),
            "W4A16_AWQ": named(WeightScheme(group_size=size or 128)),
        }
        if algorithm not in known:
            raise FormatError(f"lowbit does not read modelopt checkpoints of quant_algo {algorithm!r}")
        ignored = list(quantization_config.get("ignore") or [])

        def scheme_of(module: str) -> Scheme | None:
            return None if any(fnmatch(module, pattern) for pattern in ignored) else known[str(algorithm)]

        return scheme_of

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """hf_quant_config.json, which TensorRT-LLM reads."""
        algorithm = quantization_config["quant_algo"]
        quantization: dict[str, Any] = {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": "FP8" if quantization_config.get("kv_cache_scheme") else None,
            "exclude_modules": quantization_config["ignore"],
        }
        size = quantization_config["config_groups"]["group_0"]["weights"].get("group_size")
        if size is not None:
            quantization["group_size"] = size
        if algorithm == "W4A16_AWQ":
            quantization |= {"has_zero_point": False, "pre_quant_scale": True}
        return {"hf_quant_config.json": {"producer": quantization_config["producer"], "quantization": quantization}}

    def _weights(self, scheme: Scheme) -> WeightScheme:
        accept(self.refuse(scheme))
        assert scheme.weights is not None
        return scheme.weights


def _algorithm(scheme: Scheme) -> str | None:
    """ModelOpt's name of the scheme, None if it has none."""
    weights, activations = scheme.weights, scheme.activations
    if weights is None or not weights.symmetric or weights.reordered:
        return None
    if weights.kind == "float" and (weights.granularity, activations) == ("tensor", FP8_INPUT):
        return "FP8"
    if weights.kind == "float" and (weights.granularity, activations) == ("channel", FP8_TOKEN):
        return "FP8_PER_CHANNEL_PER_TOKEN"
    if weights == NVFP4_WEIGHTS and activations in (None, NVFP4_INPUT):
        return "NVFP4" if activations else "W4A16_NVFP4"
    if (weights.kind, weights.bits, weights.granularity, activations) == ("int", 4, "group", None):
        return "W4A16_AWQ"
    return None


def _has_input_scale(scheme: Scheme) -> bool:
    return scheme.activations in (FP8_INPUT, NVFP4_INPUT)


def _group(scheme: Scheme) -> dict[str, Any]:
    """The entry of config_groups, in the words of ModelOpt's convert_hf_config.py."""
    assert scheme.weights is not None
    weights: dict[str, Any] = {"dynamic": False, "num_bits": scheme.bits}
    weights["type"] = "int" if scheme.weights.kind == "int" else "float"
    if scheme.weights.granularity == "channel":
        weights["strategy"] = "channel"
    if scheme.weights.granularity == "group":
        weights["group_size"] = scheme.weights.group_size
    group: dict[str, Any] = {"weights": weights, "targets": ["Linear"]}
    if scheme.activations is not None:
        inputs: dict[str, Any] = {"dynamic": False, "num_bits": scheme.activations.bits, "type": "float"}
        group["input_activations"] = inputs | ({"group_size": 16} if scheme.activations == NVFP4_INPUT else {})
    return group


def _producer() -> dict[str, str]:
    from lowbit import __version__

    return {"name": "lowbit", "version": __version__}


def _scalar(extra: Mapping[str, Tensor], multiplied: str, divided: str) -> Tensor:
    if multiplied in extra:
        return extra[multiplied].float().reshape(())
    if divided in extra:
        return extra[divided].float().reciprocal().reshape(())
    raise FormatError(f"the layer has no {multiplied!r} from calibration, nothing was stored")


def _pack_rows(codes: Tensor) -> Tensor:
    """Unsigned codes [out, in] -> bytes [out/2, in] of two's complement nibbles."""
    signed = codes ^ 8
    return (signed[0::2] | (signed[1::2] << 4)).contiguous()


def _unpack_rows(packed: Tensor) -> Tensor:
    return (torch.stack((packed & 15, packed >> 4), 1) ^ 8).flatten(0, 1)


MODELOPT = ModelOptFormat()
