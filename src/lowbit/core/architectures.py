"""Model families as data: where the blocks are, which linear layers share an input, and what stands before them.

A new family is a row of ARCHITECTURES. Everything else in lowbit asks this table and never a model type.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.core.errors import ArchitectureError, did_you_mean


@dataclass(frozen=True)
class Scaling:
    """A place where scales can move from one tensor to the next without changing the function (AWQ, SmoothQuant).

    source: module of the block whose output channels are divided: a norm, or a linear layer.
    targets: linear layers that read that output; their input columns are multiplied.
    by_head: source and target are joined by attention, value -> output: under grouped-query attention one source channel
        feeds several target columns.
    half: of a fused projection [gate; up] only the rows of `up` pass linearly; "lower" scales those rows.
    """

    source: str
    targets: tuple[str, ...]
    by_head: bool = False
    half: str = ""


@dataclass(frozen=True)
class Architecture:
    """One model family.

    blocks: path of the list of decoder blocks in the causal language model.
    linears: the block's linear layers in order of execution; those in one tuple read the same input.
    scalings: see Scaling.
    transposed: linear layers are Conv1D and store [in, out].
    norm_offset: what a norm adds to its stored weight (gemma: 1 + weight).
    experts: path within the block of experts of which a token visits few; their linear layers (lowbit.core.experts) come
    after `linears`. expert_linears: the checkpoint's names of an expert's gate, up and down projection.
    stored_as: a child of the block, and what checkpoints and runtimes call it.
    Layers that a block does not have (one with experts among dense ones) are passed over.
    """

    blocks: str
    linears: tuple[tuple[str, ...], ...]
    scalings: tuple[Scaling, ...] = ()
    transposed: bool = False
    norm_offset: float = 0.0
    experts: str = ""
    expert_linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stored_as: tuple[str, str] | None = None


_ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_GATED_MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
_LLAMA = Architecture(
    blocks="model.layers",
    linears=_ATTENTION + _GATED_MLP,
    scalings=(
        Scaling("input_layernorm", _ATTENTION[0]),
        Scaling("self_attn.v_proj", ("self_attn.o_proj",), by_head=True),
        Scaling("post_attention_layernorm", _GATED_MLP[0]),
        Scaling("mlp.up_proj", ("mlp.down_proj",)),
    ),
)
_GEMMA = Architecture(
    blocks="model.layers",
    linears=_ATTENTION + _GATED_MLP,
    scalings=(
        Scaling("input_layernorm", _ATTENTION[0]),
        Scaling("self_attn.v_proj", ("self_attn.o_proj",), by_head=True),
        Scaling("pre_feedforward_layernorm", _GATED_MLP[0]),
        Scaling("mlp.up_proj", ("mlp.down_proj",)),
    ),
    norm_offset=1.0,
)
_PHI3 = Architecture(
    blocks="model.layers",
    linears=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    scalings=(
        Scaling("input_layernorm", ("self_attn.qkv_proj",)),
        Scaling("post_attention_layernorm", ("mlp.gate_up_proj",)),
        Scaling("mlp.gate_up_proj", ("mlp.down_proj",), half="lower"),
    ),
)
_GPT2 = Architecture(
    blocks="transformer.h",
    linears=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    scalings=(Scaling("ln_1", ("attn.c_attn",)), Scaling("ln_2", ("mlp.c_fc",))),
    transposed=True,
)
_OPT = Architecture(
    blocks="model.decoder.layers",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    scalings=(
        Scaling("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Scaling("self_attn.v_proj", ("self_attn.out_proj",), by_head=True),
        Scaling("final_layer_norm", ("fc1",)),
        Scaling("fc1", ("fc2",)),
    ),
)

_MIXTRAL = Architecture(
    blocks="model.layers",
    linears=_ATTENTION,
    scalings=_LLAMA.scalings[:2],
    experts="block_sparse_moe.experts",
    expert_linears=("w1", "w3", "w2"),
    stored_as=("mlp", "block_sparse_moe"),
)
_QWEN3_MOE = Architecture(
    blocks="model.layers",
    linears=_ATTENTION + _GATED_MLP,
    scalings=_LLAMA.scalings[:2],
    experts="mlp.experts",
)
_QWEN2_MOE = Architecture(
    blocks="model.layers",
    linears=_ATTENTION
    + _GATED_MLP
    + (("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), ("mlp.shared_expert.down_proj",)),
    scalings=_LLAMA.scalings[:2],
    experts="mlp.experts",
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "mixtral": _MIXTRAL,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_moe": _QWEN3_MOE,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "opt": _OPT,
}


def known_architecture(model_type: str) -> Architecture | None:
    """The table row of a model type, or None."""
    return ARCHITECTURES.get(model_type)


def unknown_architecture(model_type: str, reason: str) -> ArchitectureError:
    """The error for a model that neither the table nor a look at its modules explains."""
    return ArchitectureError(
        f"model type {model_type!r} is unknown{did_you_mean(model_type, ARCHITECTURES)}, and {reason}",
        hint="add a row for it to ARCHITECTURES in lowbit/core/architectures.py: block path and linear layers",
    )
