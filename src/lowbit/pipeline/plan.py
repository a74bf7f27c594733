"""The plan: what will happen to each linear layer, and every stored tensor with its exact size, before any work is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.contracts import Format, Method, Needs, TensorSpec
from lowbit.core.errors import FormatError, RecipeError, did_you_mean
from lowbit.core.scheme import DTYPES, Scheme
from lowbit.core.streamed_model import StreamedModel
from lowbit.formats import FORMATS, get_format
from lowbit.methods import METHODS
from lowbit.pipeline.kv_cache import cached_layers, scale_names
from lowbit.pipeline.schemes import GROUP_SIZES, Numbers, scheme_of
from lowbit.recipe import Recipe
from lowbit.transforms import TRANSFORMS
from lowbit.transforms.scaling import Transform

_KV_CACHE_FORMATS = ("compressed-tensors", "modelopt")
# by kind; floats of 8 bits have one scale a row
_AUTO_GROUP_SIZES = {"int": (128, 64, 32), "float": (), **{kind: (size,) for kind, size in GROUP_SIZES.items()}}
_OFFERED_GROUP_SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 512, 1024)


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer: its shape (out, in), its numbers, and the method that will choose them."""

    path: str
    shape: tuple[int, int]
    scheme: Scheme
    method: Method
    options: Any

    @property
    def by_row(self) -> bool:
        """Whether rows are chosen without a look at others; NVFP4 has a scale of the whole matrix besides."""
        weights = self.scheme.weights
        return self.method.by_row and weights is not None and weights.kind != "nvfp4"

    @property
    def needs(self) -> Needs:
        """What has to be known of the layer's inputs: by its method, and for scales of its inputs that are stored."""
        own: Needs = self.method.needs(self.options)
        return own | Needs(inputs=needs_input_scale(self.scheme))


@dataclass(frozen=True)
class TransformPlan:
    """A transform with its options."""

    transform: Transform
    options: Any


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first weight is read.

    layers: linear layers to quantize, by module path. skipped: linear layers left in 16 bits.
    layout: every tensor of the artifact, in the order in which it is written.
    format: None when nothing is quantized (plain safetensors). transforms: done to each block first, in order.
    kv_cache: the layers within a block that make keys and values, when scales for a cache of FP8 are stored.
    """

    layers: dict[str, LayerPlan]
    skipped: list[str]
    layout: dict[str, TensorSpec]
    format: Format | None
    dtype: torch.dtype
    transforms: tuple[TransformPlan, ...] = ()
    kv_cache: tuple[str, str] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the artifact."""
        return sum(spec.nbytes for spec in self.layout.values())

    @property
    def needs_calibration(self) -> bool:
        """Whether any transform or any layer's method wants statistics, or scales of inputs are stored."""
        return bool(self.transforms or self.kv_cache) or any(layer.needs.calibration for layer in self.layers.values())

    def scale_dtype(self, layer: LayerPlan) -> torch.dtype:
        """What the layer's scales are stored in."""
        assert self.format is not None
        return self.format.scale_dtype(layer.scheme, self.dtype)

    def quantized_bits(self) -> tuple[int, int]:
        """(weights in quantized layers, bits they take with all their metadata)."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())
        stored = sum(spec.nbytes for name, spec in self.layout.items() if self._is_of_quantized_layer(name))
        return weights, 8 * stored

    def _is_of_quantized_layer(self, name: str) -> bool:
        """Whether a stored tensor holds numbers of a quantized layer; suffixes may have dots (`weight.absmax`)."""
        path = name
        while path and path not in self.layers:
            path = path.rpartition(".")[0]
        return bool(path) and name != f"{path}.bias"


def make_plan(recipe: Recipe, model: StreamedModel) -> Plan:
    """Work out the plan. Raises RecipeError or FormatError for anything that could not work, naming what would."""
    dtype = _output_dtype(recipe, model)
    linears = linear_shapes(model)
    skipped = [path for path in linears if recipe.ignores(path) or recipe.method == "cast"]
    skipped += _other_linears(model, linears)
    quantized = {path: shape for path, shape in linears.items() if path not in skipped}
    if recipe.method == "cast":
        return Plan({}, skipped, _layout(model, {}, None, dtype), None, dtype)
    if not quantized:
        raise RecipeError("every linear layer is ignored, nothing would be quantized", hint="narrow --ignore")
    recipe = _with_group_size(recipe, quantized)
    target = get_format(recipe.format)
    transforms = _transforms(recipe, model)
    layers = {path: _plan_layer(recipe, path, shape) for path, shape in quantized.items()}
    for scheme in {layer.scheme for layer in layers.values()}:
        reason = target.refuse(scheme)
        if reason:
            raise FormatError(reason, hint=_formats_for(scheme))
    _check_own_numbers(target, layers)
    target.quantization_config({path: layer.scheme for path, layer in layers.items()}, skipped)
    kv_cache = _kv_cache(recipe, model, target)
    return Plan(layers, skipped, _layout(model, layers, target, dtype, kv_cache), target, dtype, transforms, kv_cache)


def linear_shapes(model: StreamedModel) -> dict[str, tuple[int, int]]:
    """Linear layers of all blocks and their (out, in), in order of execution, then the head."""
    shapes: dict[str, tuple[int, int]] = {}
    for index, block in enumerate(model.blocks):
        parameters = dict(block.named_parameters())
        for group in model.architecture.linears:
            for name in group:
                if f"{name}.weight" not in parameters:  # a dense block among those with experts, or the other way round
                    continue
                rows, columns = parameters[f"{name}.weight"].shape
                shape = (columns, rows) if model.architecture.transposed else (rows, columns)
                shapes[f"{model.block_path(index)}.{name}"] = shape
    head = getattr(model.skeleton, "lm_head", None)
    if isinstance(head, nn.Linear):
        shapes["lm_head"] = (head.weight.shape[0], head.weight.shape[1])
    return shapes


def _other_linears(model: StreamedModel, linears: Mapping[str, tuple[int, int]]) -> list[str]:
    """Linear layers that the table of architectures does not name (projections around the blocks, routers): a
    configuration that speaks of every linear layer has to leave them out."""
    modules = model.skeleton.named_modules()
    return [path for path, module in modules if _looks_linear(path, module) and path not in linears]


def _looks_linear(path: str, module: nn.Module) -> bool:
    """Routers of experts are no nn.Linear in transformers, but are in the runtimes that read the configuration."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (
        path.endswith(".gate") and isinstance(weight, Tensor) and weight.dim() == 2
    )


def needs_input_scale(scheme: Scheme) -> bool:
    """Whether calibration has to find a scale of the layer's inputs: static ones, and NVFP4's for the whole tensor."""
    inputs = scheme.activations
    return inputs is not None and (not inputs.dynamic or inputs.kind == "nvfp4")


def part_options(part: Method | Transform, given: Mapping[str, Any]) -> Any:
    """Options of a method or transform from plain data. Raises RecipeError for names it does not have."""
    known = [field.name for field in fields(part.options)]
    for name in given:
        if name not in known:
            raise RecipeError(
                f"{type(part).__name__.lower()} {part.name!r} has no option {name!r}{did_you_mean(name, known)}",
                hint=f"its options are {', '.join(known) or 'none'}",
            )
    return part.options(**given)


def _transforms(recipe: Recipe, model: StreamedModel) -> tuple[TransformPlan, ...]:
    if recipe.transforms and not model.architecture.scalings:
        raise RecipeError(
            f"transform {next(iter(recipe.transforms))!r} needs to know which norm feeds which layer, and model type "
            f"{model.checkpoint.config.get('model_type')!r} is not in the table of architectures",
            hint="a method without transforms, such as --method gptq",
        )
    parts = [(TRANSFORMS.get(name), given) for name, given in recipe.transforms.items()]
    return tuple(TransformPlan(transform, part_options(transform, given)) for transform, given in parts)


def _check_own_numbers(target: Format, layers: Mapping[str, LayerPlan]) -> None:
    """bitsandbytes derives a scale from a row's or block's largest weight: it cannot say one that was searched."""
    other = next((layer for layer in layers.values() if layer.method.name != "bnb"), None)
    if target.name.startswith("bitsandbytes") and other is not None:
        raise FormatError(
            f"format {target.name!r} holds scales that bitsandbytes chose, not those of method {other.method.name!r}: "
            "use method 'bnb', or format 'compressed-tensors'",
            hint=f"--method llm_int8 or nf4; --format compressed-tensors holds {other.scheme.name}",
        )


def _kv_cache(recipe: Recipe, model: StreamedModel, target: Format) -> tuple[str, str] | None:
    if recipe.kv_cache == "none":
        return None
    if target.name not in _KV_CACHE_FORMATS:
        raise FormatError(
            f"format {target.name!r} has no scales for a KV cache",
            hint=f"--format {' or '.join(_KV_CACHE_FORMATS)}, or --kv-cache none",
        )
    return cached_layers(model.architecture, str(model.checkpoint.config.get("model_type")))


def _formats_for(scheme: Scheme) -> str:
    """A hint that names the formats which hold `scheme`."""
    holding = [name for name in FORMATS.names() if get_format(name).refuse(scheme) is None]
    return (
        f"--format {' or '.join(holding)} holds {scheme.name}" if holding else "lowbit methods lists what goes together"
    )


def _plan_layer(recipe: Recipe, path: str, shape: tuple[int, int]) -> LayerPlan:
    override = recipe.override_for(path)
    method: Method = METHODS.get((override.method if override else None) or recipe.method)
    options = part_options(method, recipe.options if method.name == recipe.method else {})
    scheme = scheme_of(Numbers.of(recipe, override), method, reordered=method.reordered(options))
    _check_divisible(path, shape, scheme)
    return LayerPlan(path, shape, scheme, method, options)


def _with_group_size(recipe: Recipe, quantized: Mapping[str, tuple[int, int]]) -> Recipe:
    if recipe.group_size != "auto":
        return recipe
    inputs = {columns for _, columns in quantized.values()}
    sizes = _AUTO_GROUP_SIZES.get(recipe.kind, _AUTO_GROUP_SIZES["int"])
    fitting = (size for size in sizes if all(columns % size == 0 for columns in inputs))
    return recipe.updated(group_size=next(fitting, 0))


def _check_divisible(path: str, shape: tuple[int, int], scheme: Scheme) -> None:
    weights = scheme.weights
    if weights is not None and weights.granularity == "group" and shape[1] % weights.group_size:
        sizes = [size for size in _OFFERED_GROUP_SIZES if shape[1] % size == 0]
        raise RecipeError(
            f"group size {weights.group_size} does not divide the {shape[1]} inputs of {path}",
            hint=f"--group-size {' or '.join(map(str, sizes))} would; 0 is one scale a row; auto picks",
        )


def _output_dtype(recipe: Recipe, model: StreamedModel) -> torch.dtype:
    if recipe.dtype != "auto":
        return DTYPES[recipe.dtype]
    config = model.checkpoint.config
    stored = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), torch.bfloat16)
    return torch.bfloat16 if stored == torch.float32 else stored


def _layout(
    model: StreamedModel,
    layers: Mapping[str, LayerPlan],
    target: Format | None,
    dtype: torch.dtype,
    kv_cache: tuple[str, str] | None = None,
) -> dict[str, TensorSpec]:
    """Outside tensors first, then block by block, so that writing goes forward through the shards."""
    blocks = f"{model.architecture.blocks}."
    names = model.parameter_shapes()
    ordered = [name for name in names if not name.startswith(blocks)] + [
        name for name in names if name.startswith(blocks)
    ]
    layout: dict[str, TensorSpec] = {}
    for name in ordered:
        path, _, leaf = name.rpartition(".")
        layer = layers.get(path)
        if layer is not None and leaf == "weight" and target is not None:
            specs = target.layout(layer.scheme, layer.shape, dtype)
            layout.update({f"{path}.{suffix}": spec for suffix, spec in specs.items()})
        else:
            layout[name] = TensorSpec(dtype, names[name])
    if kv_cache is not None and target is not None:
        for index in range(len(model.blocks)):
            for name in scale_names(*kv_cache, target.name):
                layout[f"{model.block_path(index)}.{name}"] = TensorSpec(torch.float32, ())
    return layout
