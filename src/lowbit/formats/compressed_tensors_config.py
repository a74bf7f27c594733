"""Schemes to and from the configuration models of the compressed-tensors library."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lowbit.core.errors import FormatError
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.formats.layout import named

FP4_GROUP = {"nvfp4": 16, "mxfp4": 32}


def refuse(scheme: Scheme) -> str | None:
    """Why compressed-tensors cannot hold `scheme`, with the nearest that works; None if it can."""
    weights, activations = scheme.weights, scheme.activations
    if weights is None:
        return "format 'compressed-tensors' has nothing to store for an unquantized layer: leave it out of the layers"
    if weights.kind in FP4_GROUP:
        return _refuse_fp4(weights, activations)
    if weights.kind == "float":
        return _refuse_fp8(weights, activations)
    if weights.kind == "int":
        return _refuse_int(weights, activations)
    return f"format 'compressed-tensors' has no {weights.kind} weights: use format 'bitsandbytes'"


def is_packed(scheme: Scheme) -> bool:
    """Whether the layer is stored as packed integers."""
    return scheme.weights is not None and scheme.weights.kind == "int" and scheme.activations is None


def is_static(scheme: Scheme) -> bool:
    """Whether the layer stores a scale for its inputs."""
    return scheme.activations is not None and not scheme.activations.dynamic


def write(layers: Mapping[str, Scheme], skipped: list[str], kv_cache: str | None) -> dict[str, Any]:
    """The `quantization_config` entry of config.json. Raises FormatError for no layers or an unknown `kv_cache`."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    if not layers:
        raise FormatError("no layer is quantized, so there is no quantization to describe", hint="check --ignore")
    distinct = list(dict.fromkeys((scheme.weights, scheme.activations) for scheme in layers.values()))
    groups = {}
    for number, numbers in enumerate(distinct):
        own = [name for name, scheme in layers.items() if (scheme.weights, scheme.activations) == numbers]
        groups[f"group_{number}"] = _group(*numbers, targets=["Linear"] if len(distinct) == 1 else own)
    formats = {group.format for group in groups.values()}
    config = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        ignore=[*skipped, *(["lm_head"] if "lm_head" not in {*layers, *skipped} else [])],
        kv_cache_scheme=_kv_cache(kv_cache),
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    result: dict[str, Any] = config.model_dump(mode="json")
    return result


def read(quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    """A function from module path to scheme. Raises FormatError for what the library or lowbit does not know."""
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    try:
        config = QuantizationConfig.model_validate(dict(quantization_config))
    except (ValidationError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"the compressed-tensors library rejects the quantization_config: {error}") from error
    targets: list[tuple[str, Scheme]] = []
    for group in config.config_groups.values():
        if group.weights is not None:
            scheme = _scheme(group)
            targets += [(target, scheme) for target in group.targets]
    ignored = list(config.ignore or [])

    def scheme_of(module: str) -> Scheme | None:
        if any(_rank(target, module) in (0, 1) for target in ignored):
            return None
        matches = [(rank, scheme) for target, scheme in targets if (rank := _rank(target, module)) is not None]
        return min(matches, key=lambda match: match[0])[1] if matches else None

    return scheme_of


def _rank(target: str, module: str) -> int | None:
    """Precedence of a target that names `module`: 0 by name, 1 by expression, 2 by class; None if it does not."""
    if target == module:
        return 0
    if target.startswith("re:"):
        return 1 if re.match(target[3:], module) else None
    return 2 if "." not in target and target in ("Linear", "LinearBase") else None


def _refuse_int(weights: WeightScheme, activations: ActivationScheme | None) -> str | None:
    if not 2 <= weights.bits <= 8:
        return f"format 'compressed-tensors' packs 2 to 8 bits, not {weights.bits}"
    if weights.reordered:
        return (
            "compressed-tensors removed groups that move with the activation order (desc_act), and vLLM 0.32 refuses "
            "them: use the static act-order, or format 'gptq' for other runtimes"
        )
    if activations is None:
        if weights.granularity in ("group", "channel"):
            return None
        return f"packed integers have scales by group or channel, not by {weights.granularity}: use a group size"
    if activations.kind != "int" or activations.bits != 8 or activations.granularity == "group":
        return "integer weights go with 8 bit integer activations by token or tensor: use scheme w8a8"
    if weights.bits != 8 or not weights.symmetric or weights.granularity not in ("channel", "tensor"):
        return "with integer activations vLLM reads symmetric 8 bit weights by channel or tensor only: use scheme w8a8"
    return _refuse_activations(activations)


def _refuse_fp8(weights: WeightScheme, activations: ActivationScheme | None) -> str | None:
    if weights.bits != 8 or not weights.symmetric:
        return "FP8 weights are symmetric and have 8 bits: use scheme fp8"
    if weights.granularity == "group":
        return "FP8 weights have scales by tensor, channel or block, not by group: use scheme fp8"
    if activations is None:
        return None
    if activations.kind != "float" or activations.bits != 8:
        return f"FP8 weights go with FP8 activations, not {activations.kind} of {activations.bits} bits: use scheme fp8"
    if (activations.granularity == "group") != (weights.granularity == "block"):
        return "FP8 activations by group go with weights by block and the other way round: use scheme fp8_block"
    return _refuse_activations(activations)


def _refuse_activations(activations: ActivationScheme) -> str | None:
    if not activations.dynamic and activations.granularity != "tensor":
        return "static activations have one scale a tensor: use granularity tensor, or dynamic activations"
    return None


def _refuse_fp4(weights: WeightScheme, activations: ActivationScheme | None) -> str | None:
    size = FP4_GROUP[weights.kind]
    if weights.granularity != "group" or weights.group_size != size or weights.bits != 4 or not weights.symmetric:
        return f"{weights.kind} weights have symmetric groups of {size}: use group size {size}"
    if activations is not None and activations.kind != weights.kind:
        return f"{weights.kind} weights go with {weights.kind} activations or none, not {activations.kind}"
    return None


def _group(weights: WeightScheme | None, activations: ActivationScheme | None, targets: list[str]) -> Any:
    """A QuantizationScheme of the library, in the format that the library itself infers for it."""
    import torch
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme

    assert weights is not None
    inputs = _activation_arguments(activations) if activations else None
    group = QuantizationScheme(targets=targets, weights=_weight_arguments(weights), input_activations=inputs)
    group.format = infer_module_format(torch.nn.Linear, group).value
    return group


def _weight_arguments(weights: WeightScheme) -> Any:
    import torch
    from compressed_tensors.quantization import QuantizationArgs

    fields: dict[str, Any] = {"num_bits": weights.bits, "symmetric": weights.symmetric, "dynamic": False}
    fields["type"] = "int" if weights.kind == "int" else "float"
    fields["strategy"] = "tensor_group" if weights.kind == "nvfp4" else weights.granularity
    if weights.granularity == "group":
        fields["group_size"] = weights.group_size
    if weights.granularity == "block":
        fields["block_structure"] = [weights.group_size, weights.group_size]
    if weights.kind in FP4_GROUP:
        fields["scale_dtype"] = torch.float8_e4m3fn if weights.kind == "nvfp4" else torch.uint8
    return QuantizationArgs(**fields)


def _activation_arguments(activations: ActivationScheme) -> Any:
    import torch
    from compressed_tensors.quantization import QuantizationArgs

    fields: dict[str, Any] = {"num_bits": activations.bits, "symmetric": True, "dynamic": activations.dynamic}
    fields["type"] = "int" if activations.kind == "int" else "float"
    fields["strategy"] = activations.granularity
    if activations.granularity == "group":
        fields["group_size"] = activations.group_size
    if activations.kind in FP4_GROUP:
        size = FP4_GROUP[activations.kind]
        local = activations.kind == "nvfp4"
        fields |= {"num_bits": 4, "strategy": "tensor_group" if local else "group", "group_size": size}
        # NVFP4 keeps a calibrated scale for the tensor and finds those of its groups at run time: "local".
        fields |= {"dynamic": "local" if local else True}
        fields["scale_dtype"] = torch.float8_e4m3fn if local else torch.uint8
    return QuantizationArgs(**fields)


def _kv_cache(kind: str | None) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    if kind is None:
        return None
    if kind != "fp8":
        raise FormatError(f"compressed-tensors has no {kind!r} KV cache", hint="use fp8")
    return QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)


def _scheme(group: Any) -> Scheme:
    """A QuantizationScheme of the library as ours. Raises FormatError for kinds that lowbit does not read."""
    if group.output_activations is not None:
        raise FormatError("a config group quantizes output activations, which lowbit does not read")
    scheme = named(_weights(group.weights), _activations(group.input_activations))
    reason = refuse(scheme)
    if reason is not None:
        raise FormatError(f"a config group cannot be read: {reason}")
    return scheme


def _weights(args: Any) -> WeightScheme:
    kind: Any = "int" if args.type == "int" else _float_kind(args)
    strategy = {"tensor_group": "group"}.get(args.strategy, args.strategy)
    if strategy not in ("tensor", "channel", "group", "block") or kind is None:
        raise FormatError(
            f"lowbit does not read {args.num_bits} bit {args.type} weights with scales by {args.strategy}"
        )
    size = args.block_structure[0] if strategy == "block" else args.group_size if strategy == "group" else 0
    if strategy == "block" and args.block_structure[0] != args.block_structure[1]:
        raise FormatError(f"lowbit does not read blocks of {args.block_structure}, only square ones")
    return WeightScheme(kind, args.num_bits, strategy, size, args.symmetric)


def _activations(args: Any) -> ActivationScheme | None:
    if args is None:
        return None
    kind: Any = "int" if args.type == "int" else _float_kind(args)
    if kind in FP4_GROUP:
        return fp4_activations(kind)
    if kind is None or not args.symmetric or args.strategy not in ("token", "tensor", "group"):
        raise FormatError(f"lowbit does not read {args.num_bits} bit {args.type} activations by {args.strategy}")
    size = args.group_size if args.strategy == "group" else 0
    return ActivationScheme(kind, args.num_bits, args.strategy, bool(args.dynamic), size)


def fp4_activations(kind: Any) -> ActivationScheme:
    """The one activation scheme of "nvfp4" or "mxfp4": groups of a token, scaled at run time."""
    return ActivationScheme(kind, 4, "group", True, FP4_GROUP[kind])


def _float_kind(args: Any) -> Any:
    if args.num_bits == 8:
        return "float"
    if args.num_bits == 4 and args.strategy == "tensor_group":
        return "nvfp4"
    return "mxfp4" if args.num_bits == 4 and args.group_size == 32 else None
