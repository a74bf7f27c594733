"""A GGUF file as a checkpoint: Hugging Face names, dequantized one tensor at a time.

Names come from gguf-py's TensorNameMap; what llama.cpp's converter changes in the values is undone here, by architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.core.checkpoint.gguf_header import GgufTensor
from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import CheckpointError
from lowbit.core.skeleton import build_skeleton

# GGUF architectures whose q and k rows llama.cpp's converter permutes for its rope
_PERMUTED = {"llama"}
# those whose norms are stored as 1 + weight
_NORM_PLUS_ONE = {"gemma", "gemma2", "gemma3"}
# those whose linear layers are Conv1D [in, out] in Hugging Face's checkpoint
_TRANSPOSED = {"gpt2": (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")}


class GgufCheckpoint:
    """contracts.Checkpoint over a GGUF file (of a split model: any of its files). Raises CheckpointError.

    config: the model's config.json, where the file was made from a Hugging Face checkpoint that is at hand; else it is
    worked out from the metadata. dtype: what weights come out in; float16 holds what most files hold, float32 all.
    """

    def __init__(
        self, location: Path, config: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float16
    ) -> None:
        self.source = GgufSource(location)
        self.location, self.dtype = self.source.location, dtype
        self.architecture = self.source.architecture
        self.config = _config(self.location) if config is None else dict(config)
        self._sources = self._match_names()

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        specs = {}
        for name, source in self._sources.items():
            shape = source.shape[::-1] if self._is_transposed(name) else source.shape
            specs[name] = TensorSpec(self.dtype, shape)
        return specs

    def read(self, name: str) -> Tensor:
        source = self._sources.get(name)
        if source is None:
            raise CheckpointError(f"{self.location} has no tensor {name!r}")
        weight = self.source.dense(source.name)
        if self.architecture in _PERMUTED and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            weight = _unpermute(weight, int(self.config[heads]))
        if self.architecture in _NORM_PLUS_ONE and name.endswith("norm.weight"):
            weight = weight - 1
        if self._is_transposed(name):
            weight = weight.T.contiguous()
        return weight.to(self.dtype)

    def companions(self) -> dict[str, Path]:
        return {}

    def identity(self) -> str:
        return self.source.identity()

    def _is_transposed(self, name: str) -> bool:
        return name.endswith(_TRANSPOSED.get(self.architecture, ("\0",)))

    def _match_names(self) -> dict[str, GgufTensor]:
        from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
        from gguf.tensor_mapping import get_tensor_name_map

        arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == self.architecture), None)
        if not isinstance(arch, MODEL_ARCH):
            raise CheckpointError(f"{self.location.name} has the unknown architecture {self.architecture[:40]!r}")
        names = get_tensor_name_map(arch, self.source.number("block_count"))
        sources = {}
        for parameter, _ in build_skeleton(self.config).named_parameters():
            stem, _, suffix = parameter.rpartition(".")
            mapped = names.get_name(stem)
            source = self.source.tensors.get(f"{mapped}.{suffix}")
            if source is not None:
                sources[parameter] = source
        return sources


def _config(location: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(location.parent, gguf_file=location.name)
    except (ValueError, KeyError, OSError, IndexError, TypeError) as error:
        raise CheckpointError(f"{location.name} describes no model that transformers knows: {error}") from error
    content: dict[str, Any] = config.to_dict()
    content.update(dtype="float16", architectures=content.get("architectures") or [_causal_class(config)])
    return content


def _causal_class(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo the row order that llama.cpp's converter gives q and k (LlamaModel.permute, convert_hf_to_gguf.py)."""
    rows = weight.shape[0]
    return weight.view(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)
