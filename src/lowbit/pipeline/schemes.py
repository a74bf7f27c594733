"""A recipe's words for numbers -> the schemes of core.scheme, checked against the method that is to choose them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowbit.core.contracts import Method
from lowbit.core.errors import RecipeError
from lowbit.core.scheme import ActivationScheme, Granularity, Kind, Scheme, WeightScheme
from lowbit.recipe import Override, Recipe

_ACTIVATIONS: dict[str, ActivationScheme | None] = {
    "none": None,
    "int8": ActivationScheme("int", 8, "token"),
    "int8_static": ActivationScheme("int", 8, "tensor", dynamic=False),
    "fp8": ActivationScheme("float", 8, "token"),
    "fp8_static": ActivationScheme("float", 8, "tensor", dynamic=False),
    "mxfp4": ActivationScheme("mxfp4", 4, "group", True, 32),
    "nvfp4": ActivationScheme("nvfp4", 4, "group", True, 16),
}
_METHOD_OF_KIND = {
    "float": "fp8",
    "nf4": "bnb",
    "fp4": "bnb",
    "mxfp4": "fp4 or gptq",
    "nvfp4": "fp4 or gptq",
    "int": "rtn or gptq",
}
_BITS = {"float": 8, "nf4": 4, "fp4": 4, "mxfp4": 4, "nvfp4": 4}
# columns that share a scale, where that is part of the kind
GROUP_SIZES = {"mxfp4": 32, "nvfp4": 16}


@dataclass(frozen=True)
class Numbers:
    """A recipe's numbers for one layer: its fields, with those of an override in their place."""

    kind: Kind
    bits: int
    group_size: int
    symmetric: bool
    granularity: Literal["auto", "tensor", "channel", "group", "block"]
    activations: str

    @classmethod
    def of(cls, recipe: Recipe, override: Override | None) -> Numbers:
        """The recipe's fields, but where the override says something else."""
        own = {name: getattr(override, name, None) for name in cls.__dataclass_fields__}
        return cls(**{name: getattr(recipe, name) if value is None else value for name, value in own.items()})


def scheme_of(numbers: Numbers, method: Method, *, reordered: bool) -> Scheme:
    """Raises RecipeError for numbers that contradict each other or that `method` cannot choose, naming what would do."""
    granularity = _granularity(numbers)
    _check_method(numbers, granularity, method)
    size = int(numbers.group_size) if granularity in ("group", "block") else 0
    own = GROUP_SIZES.get(numbers.kind, size)
    if size != own:
        raise RecipeError(f"{numbers.kind} has groups of {own}, not {size}", hint=f"--group-size {own}")
    bits = _BITS.get(numbers.kind, numbers.bits)
    if bits > 8:
        raise RecipeError(f"{bits} bit integers are not stored by any format", hint="--bits 8, or --method bf16")
    if numbers.kind != "int" and not numbers.symmetric:
        raise RecipeError(f"{numbers.kind} numbers have no zero points", hint="--sym")
    if numbers.kind != "int" and reordered:
        raise RecipeError(f"groups of {numbers.kind} stay where they are", hint="--option act_order=static")
    weights = WeightScheme(numbers.kind, bits, granularity, size, numbers.symmetric, reordered)
    activations = _activations(numbers.activations, size)
    return Scheme(_name(weights, activations), weights, activations)


def _granularity(numbers: Numbers) -> Granularity:
    if numbers.granularity != "auto":
        if numbers.granularity in ("group", "block") and not numbers.group_size:
            raise RecipeError(f"granularity {numbers.granularity!r} needs a group size", hint="--group-size 128")
        return numbers.granularity
    return "group" if numbers.group_size else "channel"


def _check_method(numbers: Numbers, granularity: Granularity, method: Method) -> None:
    if numbers.kind not in method.kinds:
        raise RecipeError(
            f"method {method.name!r} chooses {', '.join(method.kinds)} numbers, not {numbers.kind}",
            hint=f"method {_METHOD_OF_KIND[numbers.kind]} does; kind {method.kinds[0]} is what {method.name} makes",
        )
    if granularity not in method.granularities:
        raise RecipeError(
            f"method {method.name!r} has scales by {' or '.join(method.granularities)}, not by {granularity}",
            hint=f"granularity: {method.granularities[0]}",
        )


def _activations(name: str, group_size: int) -> ActivationScheme | None:
    if name == "fp8_group":
        return ActivationScheme("float", 8, "group", True, group_size or 128)
    return _ACTIVATIONS[name]


def _name(weights: WeightScheme, activations: ActivationScheme | None) -> str:
    """What the field calls these numbers."""
    bits = activations.bits if activations else 16
    if weights.kind == "int":
        return f"w{weights.bits}a{bits}"
    if weights.kind == "float":
        return "fp8" if activations else "fp8a16"
    if weights.kind in ("nf4", "fp4") or activations:
        return weights.kind
    return f"{weights.kind}a16"
