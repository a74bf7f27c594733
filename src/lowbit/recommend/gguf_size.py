"""The exact size of a GGUF file before any conversion: tensors from the checkpoint's parameter names and shapes, types from
llama-quantize's policy, the vocabulary from the tokenizer.

Names: gguf-py's TensorNameMap. Which tensors stay in 32 bits: llama.cpp, convert_hf_to_gguf.py (ModelBase.prepare_tensors).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.core.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf import PlannedTensor, lay_out
from lowbit.methods.kquants.policy import ModelInfo, PolicyOptions, TensorInfo, tensor_types
from lowbit.recommend.shape import ModelShape

# model types of transformers whose name in llama.cpp is another one
_ARCHITECTURES = {
    "mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "gpt_oss": "gpt-oss", "phi": "phi2", "phi3": "phi3",
    "cohere": "command-r", "gpt_neox": "gptneox", "gpt_bigcode": "starcoder", "glm4_moe": "glm4moe",
}  # fmt: skip
_REPACKED = ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4")
_KEYS = 4096  # numbers, names, the recipe: bytes of metadata besides vocabulary and template
# without a tokenizer at hand: bytes of one token and of what merges it, mean over GPT-2, Llama 3 and Qwen 2.5
_TOKEN_BYTES = 34


_EXPERT = re.compile(r"\.layers\.(\d+)\..*\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$")
_MERGED = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def gguf_tensors(parameters: Mapping[str, tuple[int, ...]], shape: ModelShape) -> list[TensorInfo]:
    """The unquantized GGUF file's tensors (matrices in 16 bits, vectors in 32).

    Raises ArchitectureError for a family that llama.cpp does not know.
    """
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    name = _ARCHITECTURES.get(shape.model_type, shape.model_type)
    arch = next((key for key, known in MODEL_ARCH_NAMES.items() if known == name), None)
    if not isinstance(arch, MODEL_ARCH):
        raise ArchitectureError(f"llama.cpp knows no model of type {shape.model_type!r}", hint="a safetensors format")
    names = get_tensor_name_map(arch, shape.blocks)
    found: dict[str, tuple[int, ...]] = {}
    for parameter, size in parameters.items():
        expert = _EXPERT.search(parameter)
        if expert is not None:  # the file has all experts of a block in one tensor
            found[f"blk.{expert[1]}.ffn_{_MERGED[expert[3]]}_exps.weight"] = (shape.experts, *size)
            continue
        stem, _, suffix = parameter.rpartition(".")
        if suffix == "gate_up_proj" and len(size) == 3:  # fused experts of transformers 5: [experts, 2 x width, hidden]
            block = stem.split(".layers.")[1].split(".")[0]
            half = (size[0], size[1] // 2, size[2])
            found.update({f"blk.{block}.ffn_gate_exps.weight": half, f"blk.{block}.ffn_up_exps.weight": half})
        elif suffix == "down_proj" and len(size) == 3:
            found[f"blk.{stem.split('.layers.')[1].split('.')[0]}.ffn_down_exps.weight"] = size
        else:
            mapped = names.get_name(stem) or names.get_name(parameter)
            if mapped is not None:
                found[f"{mapped}.{suffix if suffix in ('weight', 'bias') else 'weight'}"] = size
    if "token_embd.weight" not in found:
        raise ArchitectureError(f"the tensors of a {shape.model_type} are not known by llama.cpp's names")
    return [TensorInfo(key, size, _stored_type(key, size)) for key, size in found.items()]


def gguf_plan(
    method: str, tensors: list[TensorInfo], shape: ModelShape, options: PolicyOptions | None = None
) -> list[PlannedTensor]:
    """Every tensor of a file of type `method`, with its type. Raises FormatError when a tensor fits no type."""
    arch = _ARCHITECTURES.get(shape.model_type, shape.model_type)
    info = ModelInfo(arch, shape.blocks, shape.heads, shape.kv_heads, shape.experts)
    types = tensor_types("f16" if method == "fp16" else method, tensors, info, options)
    return [PlannedTensor(tensor.name, tensor.shape, types[tensor.name]) for tensor in tensors]


def gguf_bytes(
    method: str, tensors: list[TensorInfo], shape: ModelShape, vocabulary: int, options: PolicyOptions | None = None
) -> tuple[int, int, int]:
    """(bytes of the file, of its tensors, of those that CPU kernels repack) for the file type `method`.

    vocabulary: bytes of metadata, `vocabulary_bytes`. Raises FormatError when a tensor fits no type.
    """
    planned = gguf_plan(method, tensors, shape, options)
    files = lay_out("model.gguf", {"metadata": bytes(vocabulary + _KEYS)}, planned)
    repacked = repacked_bytes({tensor.name: (tensor.ggml_type, tensor.nbytes) for tensor in planned})
    return sum(file.size for file in files), sum(tensor.nbytes for tensor in planned), repacked


def repacked_bytes(tensors: Mapping[str, tuple[str, int]]) -> int:
    """Of tensors (name -> type, bytes): those that llama.cpp copies into another order for its CPU kernels (AVX2; NEON has
    the same main types). Source: llama.cpp, ggml/src/ggml-cpu/repack.cpp."""
    return sum(size for name, (kind, size) in tensors.items() if kind in _REPACKED and name != "token_embd.weight")


def vocabulary_bytes(companions: Mapping[str, Path], shape: ModelShape) -> int:
    """Bytes that tokens, their kinds, merges and the chat template take in the file's metadata."""
    file = companions.get("tokenizer.json")
    if file is None:
        return shape.vocabulary * _TOKEN_BYTES
    try:
        content = json.loads(file.read_text())
        return _tokens(content, shape.vocabulary, scored="tokenizer.model" in companions) + _template(companions)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no readable tokenizer: {error}") from error


def _tokens(content: Mapping[str, Any], size: int, *, scored: bool) -> int:
    vocabulary: Mapping[str, int] | list[list[Any]] = content["model"]["vocab"]
    tokens = list(vocabulary) if isinstance(vocabulary, Mapping) else [str(entry[0]) for entry in vocabulary]
    merges = [] if scored else content["model"].get("merges") or []
    # each text with its length in 8 bytes; a kind in 4; SentencePiece: a score in 4
    texts = sum(8 + len(token.encode()) for token in tokens) + 13 * max(size - len(tokens), 0)
    joined = (merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
    return texts + (8 if scored else 4) * max(size, len(tokens)) + sum(8 + len(merge.encode()) for merge in joined)


def _template(companions: Mapping[str, Path]) -> int:
    file = companions.get("chat_template.jinja")
    return file.stat().st_size if file is not None else 0


def _stored_type(name: str, shape: tuple[int, ...]) -> str:
    return "F32" if len(shape) < 2 or name.endswith(("_norm.weight", "ffn_gate_inp.weight")) else "F16"
