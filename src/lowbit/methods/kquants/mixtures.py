"""The mixtures behind the file types: which tensors get more or fewer bits than the file's default type.

Source: llama.cpp, src/llama-quant.cpp (llama_tensor_get_type_impl), for the file types that lowbit writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

from lowbit.core.errors import FormatError
from lowbit.core.ggml_types import FileType, ggml_type


@dataclass(frozen=True)
class ModelInfo:
    """What the policy needs of a model's GGUF metadata; heads are those of block 0."""

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0

    @property
    def n_gqa(self) -> int:
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp calls the model's size 70B, which it goes by the number of blocks for."""
        if self.n_layer != 80:
            return False
        if self.arch == "llama":
            return self.n_head != self.n_head_kv and self.n_expert != 8
        return self.arch in ("qwen2", "deci", "olmoe")


class Category(Enum):
    """Broad roles of tensors."""

    TOKEN_EMBEDDING = auto()
    ATTENTION_Q = auto()
    ATTENTION_K = auto()
    ATTENTION_V = auto()
    ATTENTION_QKV = auto()
    ATTENTION_KV_B = auto()
    ATTENTION_OUTPUT = auto()
    FFN_DOWN = auto()
    OUTPUT = auto()
    OTHER = auto()


_BY_NAME = {
    "output.weight": Category.OUTPUT,
    "token_embd.weight": Category.TOKEN_EMBEDDING,
    "per_layer_token_embd.weight": Category.TOKEN_EMBEDDING,
}
_BY_PART = {
    "attn_qkv.weight": Category.ATTENTION_QKV,
    "attn_kv_b.weight": Category.ATTENTION_KV_B,
    "attn_v.weight": Category.ATTENTION_V,
    "attn_k.weight": Category.ATTENTION_K,
    "attn_q.weight": Category.ATTENTION_Q,
    "attn_output.weight": Category.ATTENTION_OUTPUT,
    "ffn_up": Category.OTHER,
    "ffn_gate": Category.OTHER,
    "ffn_down": Category.FFN_DOWN,
}


def category_of(name: str) -> Category:
    """The role a tensor's name says it has."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    return next((category for part, category in _BY_PART.items() if part in name), Category.OTHER)


def is_attention_v(category: Category) -> bool:
    """Value-like projections, which lose most from few bits."""
    return category in (Category.ATTENTION_V, Category.ATTENTION_QKV, Category.ATTENTION_KV_B)


@dataclass
class Counters:
    """Running state over the tensors in loading order: the rules go by how many of a kind came before."""

    n_attention_v: int
    tied: bool
    i_attention_v: int = 0
    i_ffn_down: int = 0


def mixture_type(
    kind: FileType, name: str, shape: tuple[int, ...], model: ModelInfo, counters: Counters, *, has_imatrix: bool
) -> str:
    """The type of the tensor `name` (shape as in torch) in a file of type `kind`, before any fallback.

    Must be called in loading order; advances `counters`. Raises FormatError for an expert tensor outside any block.
    """
    category = category_of(name)
    if category is Category.OUTPUT or (counters.tied and category is Category.TOKEN_EMBEDDING):
        return _output_type(kind, shape[-1], model)
    if kind.name == "MXFP4_MOE":
        return "MXFP4" if len(shape) > 2 and shape[-3] > 1 and _expert(name, model) else "Q8_0"
    if is_attention_v(category):
        chosen = _attention_v_type(kind, model, counters)
        counters.i_attention_v += 1
        return chosen
    if category is Category.ATTENTION_K:
        return "Q8_0" if model.n_expert == 8 else kind.default_type
    if category is Category.FFN_DOWN:
        chosen = _ffn_down_type(kind, _layer(name, model, counters), model, has_imatrix)
        counters.i_ffn_down += 1
        return chosen
    if category is Category.ATTENTION_OUTPUT:
        return _attention_output_type(kind, model)
    return kind.default_type


def _expert(name: str, model: ModelInfo) -> bool:
    """In bailingmoe3 the latent-attention projections are 3-dimensional as well."""
    return model.arch != "bailingmoe3" or any(part in name for part in ("ffn_up", "ffn_gate", "ffn_down"))


def _more_bits(i_layer: int, n_layer: int) -> bool:
    return i_layer < n_layer // 8 or i_layer >= 7 * n_layer // 8 or (i_layer - n_layer // 8) % 3 == 2


def _output_type(kind: FileType, columns: int, model: ModelInfo) -> str:
    if kind.name == "MXFP4_MOE" or model.arch == "falcon" or columns % ggml_type(kind.default_type).block_size:
        return "Q8_0"
    return "Q8_0" if kind.default_type == "Q8_0" else "Q6_K"


def _attention_v_type(kind: FileType, model: ModelInfo, counters: Counters) -> str:
    chosen = _attention_v_mixture(kind, model, counters)
    if model.is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if model.n_expert == 8 else chosen


def _attention_v_mixture(kind: FileType, model: ModelInfo, counters: Counters) -> str:
    i_layer = counters.i_attention_v
    match kind.name:
        case "Q2_K":
            return "Q4_K" if model.n_gqa >= 4 else "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if i_layer < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "IQ4_NL" | "IQ4_XS" if model.n_gqa >= 4:
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if _more_bits(i_layer, counters.n_attention_v):
            return "Q6_K"
        case "Q4_K_S" if i_layer < 4:
            return "Q5_K"
    return kind.default_type


def _layer(name: str, model: ModelInfo, counters: Counters) -> int:
    """The block of an ffn_down tensor: by count, or by name where experts may come in any number and order."""
    if model.n_expert <= 1:
        return counters.i_ffn_down
    found = re.match(r"blk\.(\d+)\.", name)
    if found is None or int(found[1]) >= model.n_layer:
        raise FormatError(f"{name} is an expert tensor outside the model's {model.n_layer} blocks.")
    return int(found[1])


def _ffn_down_type(kind: FileType, i_layer: int, model: ModelInfo, has_imatrix: bool) -> str:
    n_layer = model.n_layer
    falcon = model.arch == "falcon"
    first_eighth, more_bits = i_layer < n_layer // 8, _more_bits(i_layer, n_layer)
    match kind.name:
        case "Q2_K":
            return "Q3_K"
        case "Q3_K_M":
            if i_layer < n_layer // 16:
                return "Q5_K"
            return "Q4_K" if not falcon or more_bits else "Q3_K"
        case "Q3_K_L":
            return "Q4_K" if falcon else "Q5_K"
        case "Q4_K_M" if falcon:
            return "Q6_K" if i_layer < n_layer // 16 else "Q5_K" if more_bits else "Q4_K"
        case "Q4_K_M" | "Q5_K_M" if more_bits:
            return "Q6_K"
        case "IQ4_NL" | "IQ4_XS" if first_eighth and not has_imatrix:
            return "Q5_K"
        case "Q4_K_S" if first_eighth and not falcon:
            return "Q5_K"
        case "Q4_0" | "Q5_0" if first_eighth and has_imatrix:
            return "Q4_1" if kind.name == "Q4_0" else "Q5_1"
    return kind.default_type


def _attention_output_type(kind: FileType, model: ModelInfo) -> str:
    if model.arch == "falcon":
        return "Q4_K" if kind.name == "Q3_K_L" else kind.default_type
    if model.n_expert == 8:
        raised = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")
        return "Q5_K" if kind.name in raised else kind.default_type
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(kind.name, kind.default_type)
