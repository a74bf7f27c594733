"""A GGUF file as a checkpoint: Hugging Face names, dequantized one tensor at a time.

Names come from gguf-py's TensorNameMap; what llama.cpp's converter changes in the values is undone here, by architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.core.checkpoint.gguf_header import GgufTensor, read_gguf_header
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
    """contracts.Checkpoint over one GGUF file; weights come out as float16. Raises CheckpointError."""

    def __init__(self, location: Path) -> None:
        self.location = location
        self.header = read_gguf_header(location)
        self.architecture = str(self.header.metadata.get("general.architecture", ""))
        self.config = _config(location)
        self._sources = self._match_names()

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        specs = {}
        for name, source in self._sources.items():
            shape = source.shape[::-1] if self._is_transposed(name) else source.shape
            specs[name] = TensorSpec(torch.float16, shape)
        return specs

    def read(self, name: str) -> Tensor:
        source = self._sources.get(name)
        if source is None:
            raise CheckpointError(f"{self.location} has no tensor {name!r}")
        weight = torch.from_numpy(self._dequantize(source))
        if self.architecture in _PERMUTED and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            weight = _unpermute(weight, int(self.config[heads]))
        if self.architecture in _NORM_PLUS_ONE and name.endswith("norm.weight"):
            weight = weight - 1
        if self._is_transposed(name):
            weight = weight.T.contiguous()
        return weight.to(torch.float16)

    def companions(self) -> dict[str, Path]:
        return {}

    def identity(self) -> str:
        stat = self.location.stat()
        with self.location.open("rb") as stream:
            head = stream.read(self.header.data_start)
        return hashlib.sha256(head + f"{stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()

    def _dequantize(self, source: GgufTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        data = np.fromfile(self.location, dtype=np.uint8, count=source.nbytes, offset=source.offset)
        try:
            dense = dequantize(data.reshape(*source.shape[:-1], -1), GGMLQuantizationType[source.ggml_type])
        except NotImplementedError as error:
            raise CheckpointError(f"{source.name} is stored as {source.ggml_type}, which cannot be read") from error
        return np.ascontiguousarray(dense, dtype=np.float32).reshape(source.shape)

    def _is_transposed(self, name: str) -> bool:
        return name.endswith(_TRANSPOSED.get(self.architecture, ("\0",)))

    def _match_names(self) -> dict[str, GgufTensor]:
        from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
        from gguf.tensor_mapping import get_tensor_name_map

        arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == self.architecture), None)
        if not isinstance(arch, MODEL_ARCH):
            raise CheckpointError(f"{self.location.name} has the unknown architecture {self.architecture[:40]!r}")
        blocks = int(self.header.metadata.get(f"{self.architecture}.block_count", 0))
        names = get_tensor_name_map(arch, blocks)
        sources = {}
        for parameter, _ in build_skeleton(self.config).named_parameters():
            stem, _, suffix = parameter.rpartition(".")
            mapped = names.get_name(stem)
            source = self.header.tensors.get(f"{mapped}.{suffix}")
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
