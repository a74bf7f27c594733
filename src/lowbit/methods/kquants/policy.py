"""Which tensor of a model gets which ggml type: llama-quantize's policy, rule for rule.

Source: llama.cpp, src/llama-quant.cpp (tensor_allows_quantization, llama_tensor_get_type, tensor_type_fallback) and
tools/quantize/quantize.cpp (options).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowbit.core.errors import FormatError
from lowbit.core.ggml_types import FileType, file_type, ggml_type
from lowbit.methods.kquants.mixtures import Category, Counters, ModelInfo, category_of, is_attention_v, mixture_type

__all__ = ["ModelInfo", "PolicyOptions", "TensorInfo", "parse_tensor_type", "tensor_types"]

_NOT_QUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
_NOT_QUANTIZED_NAMES = ("position_embd.weight", "token_types.weight")

_FALLBACKS = {"IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the unquantized GGUF: name, shape as in torch (columns last) and the ggml type it has now."""

    name: str
    shape: tuple[int, ...]
    type: str = "F32"


@dataclass(frozen=True)
class PolicyOptions:
    """llama-quantize's options that change types; type names as in `GGML_TYPES`.

    `tensor_overrides` are (regular expression, type), the first that matches anywhere in a name wins.
    """

    pure: bool = False
    leave_output_tensor: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    tensor_overrides: tuple[tuple[str, str], ...] = field(default=())
    has_imatrix: bool = False


def parse_tensor_type(argument: str) -> tuple[str, str]:
    """`PATTERN=TYPE` of --tensor-type; the pattern is lowercased, as llama-quantize does. FormatError if malformed."""
    pattern, separator, type_name = argument.rpartition("=")
    if not separator or not pattern:
        raise FormatError(f"--tensor-type {argument!r} is not PATTERN=TYPE.", hint="for example attn_v=Q6_K")
    _compile(pattern.lower())
    return pattern.lower(), ggml_type(type_name).name


def tensor_types(
    ftype: str, tensors: Sequence[TensorInfo], model: ModelInfo, options: PolicyOptions | None = None
) -> dict[str, str]:
    """The type of every tensor, in the order given, when a model is quantized to the file type `ftype`.

    Raises FormatError for an unknown type, and for a tensor no type fits (a row that is no multiple of 32).
    """
    options = options or PolicyOptions()
    kind = file_type(ftype)
    overrides = [(_compile(pattern), ggml_type(name).name) for pattern, name in options.tensor_overrides]
    counters = Counters(
        n_attention_v=sum(is_attention_v(category_of(tensor.name)) for tensor in tensors),
        tied=not any(tensor.name == "output.weight" for tensor in tensors),
    )
    chosen = {
        tensor.name: _choose(kind, tensor, model, options, overrides, counters)
        for tensor in sorted(tensors, key=_loading_order)
    }
    return {tensor.name: chosen[tensor.name] for tensor in tensors}


def _choose(
    kind: FileType,
    tensor: TensorInfo,
    model: ModelInfo,
    options: PolicyOptions,
    overrides: list[tuple[re.Pattern[str], str]],
    counters: Counters,
) -> str:
    category = category_of(tensor.name)
    if not _may_quantize(tensor, options):
        return tensor.type
    if options.token_embedding_type and category is Category.TOKEN_EMBEDDING:
        return _fitting(ggml_type(options.token_embedding_type).name, tensor)
    if options.output_tensor_type and category is Category.OUTPUT:
        return _fitting(ggml_type(options.output_tensor_type).name, tensor)
    if not ggml_type(kind.default_type).quantized:
        return kind.default_type
    manual = next((name for pattern, name in overrides if pattern.search(tensor.name)), None)
    if manual is not None:
        return _with_fallback(manual, tensor)
    if options.pure:
        return _with_fallback(kind.default_type, tensor)
    if options.output_tensor_type and counters.tied and category is Category.TOKEN_EMBEDDING:
        return _with_fallback(ggml_type(options.output_tensor_type).name, tensor)
    return _with_fallback(
        mixture_type(kind, tensor.name, tensor.shape, model, counters, has_imatrix=options.has_imatrix), tensor
    )


def _loading_order(tensor: TensorInfo) -> tuple[int, str]:
    """llama.cpp visits tensors by block number, then by name; counters of blocks depend on it."""
    found = re.match(r"blk\.(\d+)\.", tensor.name)
    return int(found[1]) if found else -1, tensor.name


def _may_quantize(tensor: TensorInfo, options: PolicyOptions) -> bool:
    return (
        len(_without_leading_ones(tensor.shape)) >= 2
        and tensor.name.endswith("weight")
        and not (options.leave_output_tensor and tensor.name == "output.weight")
        and tensor.name not in _NOT_QUANTIZED_NAMES
        and not any(part in tensor.name for part in _NOT_QUANTIZED)
    )


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """ggml counts the dimensions of a tensor without outer dimensions of one."""
    first = next((at for at, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


def _with_fallback(type_name: str, tensor: TensorInfo) -> str:
    """`type_name`, or what llama-quantize falls back to when rows are no whole number of its blocks."""
    columns = tensor.shape[-1]
    if columns % ggml_type(type_name).block_size == 0:
        return type_name
    fallback = _FALLBACKS.get(type_name)
    if fallback is None:
        return _fitting(type_name, tensor)
    return fallback if columns % ggml_type(fallback).block_size == 0 else "F16"


def _fitting(type_name: str, tensor: TensorInfo) -> str:
    block = ggml_type(type_name).block_size
    if tensor.shape[-1] % block:
        raise FormatError(
            f"{tensor.name} has rows of {tensor.shape[-1]} weights, which {type_name} (blocks of {block}) cannot hold.",
            hint=f"--tensor-type {re.escape(tensor.name)}=F16",
        )
    return type_name


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise FormatError(f"--tensor-type pattern {pattern!r} is not a regular expression: {error}.") from error
