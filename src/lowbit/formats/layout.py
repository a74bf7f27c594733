"""Small checks and names that every format shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowbit.core.contracts import Format, TensorSpec
from lowbit.core.errors import FormatError
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme


@runtime_checkable
class StoredFormat(Format, Protocol):
    """A format that can also be found again among the tensors of a checkpoint.

    markers: suffixes of which one is stored for every quantized layer and for no other.
    suffixes: every suffix that `encode` may give.
    """

    markers: tuple[str, ...]
    suffixes: tuple[str, ...]

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """The dtype that scales are stored in, for a model whose dtype is `dtype`. `encode` refuses scales that it
        would round, so a method chooses its scales in this dtype."""
        ...

    def dense_shape(
        self, specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], Tensor]
    ) -> tuple[int, int]:
        """(out, in) of the layer whose stored tensors are `specs` by suffix; `read` gives the data of a (small) one."""
        ...


def exact(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`tensor` in `dtype`. Raises FormatError if that changes a value, or if a value is not finite."""
    converted = tensor.to(dtype)
    if not torch.isfinite(converted.float()).all():
        raise FormatError(f"{what} is not finite in {str(dtype).removeprefix('torch.')}, nothing was stored")
    if not torch.equal(converted.to(torch.float64), tensor.to(torch.float64)):
        raise FormatError(
            f"{what} would be rounded from {tensor.dtype} to {dtype}, nothing was stored",
            hint="choose scales in the dtype that the format's scale_dtype names",
        )
    return converted.contiguous()


def require(tensors: Mapping[str, Tensor], suffix: str, dtypes: Iterable[torch.dtype], dims: int) -> Tensor:
    """The stored tensor `suffix`, of one of `dtypes` and with `dims` dimensions. Raises FormatError."""
    if suffix not in tensors:
        raise FormatError(f"a quantized layer has no {suffix!r} tensor beside {', '.join(sorted(tensors))}")
    tensor, known = tensors[suffix], tuple(dtypes)
    if tensor.dtype not in known or tensor.dim() != dims:
        raise FormatError(
            f"{suffix!r} is {tensor.dtype} with shape {tuple(tensor.shape)}, not {known[0]} with {dims} dimensions"
        )
    return tensor


def require_shape(tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raises FormatError unless `tensor` has `shape`."""
    if tuple(tensor.shape) != shape:
        raise FormatError(f"{what} has shape {tuple(tensor.shape)}, the layer's other tensors need {shape}")


def require_multiple(size: int, factor: int, what: str, reason: str) -> None:
    """Raises FormatError unless `factor` divides `size`."""
    if size % factor:
        raise FormatError(
            f"{what} {size} is not a multiple of {factor}, which {reason}", hint="leave this layer out with --ignore"
        )


def require_groups(scheme: WeightScheme, columns: int) -> None:
    """Raises FormatError unless the group size divides the columns."""
    if scheme.granularity == "group":
        require_multiple(columns, scheme.group_size, "the number of inputs", "is the group size")


def accept(reason: str | None) -> None:
    """Raises FormatError with what `refuse` answered, if it did."""
    if reason is not None:
        raise FormatError(reason)


def most_common(layers: Mapping[str, Scheme]) -> Scheme:
    """The scheme of most layers (the first one on a tie). Raises FormatError for no layers."""
    if not layers:
        raise FormatError("no layer is quantized, so there is no quantization to describe", hint="check --ignore")
    return Counter(layers.values()).most_common(1)[0][0]


def field(config: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """An entry of a foreign configuration. Raises FormatError when it is missing or of another type."""
    value = config.get(name, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"quantization_config has {name} = {value!r}, which is not of type {kind.__name__}")
    return value


def named(weights: WeightScheme, activations: ActivationScheme | None = None) -> Scheme:
    """A scheme that was read from a checkpoint, under the name the field gives it."""
    suffix = f"a{activations.bits}" if activations else "a16"
    if weights.kind == "int":
        return Scheme(f"w{weights.bits}{suffix}", weights, activations)
    if weights.kind == "float":
        return Scheme("fp8" if activations else "fp8a16", weights, activations)
    if weights.kind in ("nf4", "fp4"):
        return Scheme(weights.kind, weights, activations)
    return Scheme(weights.kind if activations else f"{weights.kind}a16", weights, activations)


def same_numbers(name: str, layers: Mapping[str, Scheme]) -> None:
    """Raises FormatError when layers differ and format `name` has one configuration for all."""
    base = most_common(layers)
    other = next((module for module, scheme in layers.items() if _numbers(scheme) != _numbers(base)), None)
    if other is not None:
        raise FormatError(
            f"format {name!r} has one configuration for all layers, but {other} is not quantized like the others",
            hint="use format 'compressed-tensors' or 'gptq', or quantize all layers alike",
        )


def skips_by_part(layers: Iterable[str], skipped: Iterable[str]) -> list[str]:
    """Names for a list of layers to leave out whose readers take every path that contains one of them.

    Raises FormatError when one of `skipped` is contained in the path of a quantized layer.
    """
    names = list(skipped)
    names += ["lm_head"] if "lm_head" not in {*layers, *names} else []
    for name in names:
        hit = next((module for module in layers if name in module), None)
        if hit is not None:
            raise FormatError(
                f"leaving out {name} would leave out {hit} too, whose path contains it", hint="use another format"
            )
    return names


def _numbers(scheme: Scheme) -> tuple[WeightScheme | None, ActivationScheme | None]:
    return scheme.weights, scheme.activations
