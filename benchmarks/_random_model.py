"""Checkpoints of random numbers in the shape of Llama or Mixtral, with text for them; no network, nothing downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{n:02X}>" for n in range(256))


@dataclass(frozen=True)
class Shape:
    """experts: 0 for one feed-forward network a block, as Llama has it; else Mixtral's."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int = 0
    experts_per_token: int = 2


def write_text(file: Path, tokens: int, shape: Shape) -> Path:
    """Random words, one for each token: the tokenizer of `write_model` knows them whole."""
    words = min(3000, shape.vocabulary - len(_SPECIAL) - len(_BYTES))
    drawn = torch.randint(words, (tokens,), generator=torch.Generator().manual_seed(0))
    file.write_text(" ".join(f"w{n}" for n in drawn.tolist()))
    return file


def write_model(folder: Path, layers: int, shape: Shape) -> None:
    """A float16 checkpoint at `folder`, which must not exist: one file a layer, and one for what is outside of them."""
    folder.mkdir()
    _config(layers, shape).save_pretrained(folder)
    _write_tokenizer(folder, shape.vocabulary)
    weight_map, total = {}, 0
    for name, tensors in _files(layers, shape):
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    # transformers loads no index without metadata
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(layers: int, shape: Shape) -> Any:
    from transformers import LlamaConfig, MixtralConfig

    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 4096,
        "dtype": "float16",
    }
    if not shape.experts:
        return LlamaConfig(architectures=["LlamaForCausalLM"], **common)
    experts = {"num_local_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
    return MixtralConfig(architectures=["MixtralForCausalLM"], **experts, **common)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Whole words, split at spaces. As BPE with bytes to fall back on and a sequence as decoder, because llama.cpp's converter
    takes that for Llama's own (LlamaHfVocab in its gguf/vocab.py), without the list of pre-tokenizers that it knows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*_SPECIAL, *_BYTES]
    tokens += [f"w{n}" for n in range(vocabulary - len(tokens))]
    numbers = {token: n for n, token in enumerate(tokens)}
    # ignore_merges: a word that is in the vocabulary is one token, though no merges lead to it
    model = models.BPE(numbers, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    unknown, begin, end = _SPECIAL
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token=unknown, bos_token=begin, eos_token=end).save_pretrained(
        folder
    )


def _files(layers: int, shape: Shape) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """File name -> its tensors. llama.cpp's converter sees no other files than model*.safetensors."""
    embedding = (shape.vocabulary, shape.hidden)
    outside = {"model.embed_tokens": embedding, "lm_head": embedding}
    yield "model-outside.safetensors", _tensors(outside, ["model.norm"], shape.hidden)
    for i in range(layers):
        matrices = {f"model.layers.{i}.{name}": size for name, size in _matrices(shape).items()}
        norms = [f"model.layers.{i}.{name}_layernorm" for name in ("input", "post_attention")]
        yield f"model-layer{i}.safetensors", _tensors(matrices, norms, shape.hidden)


def _matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """Name in a layer -> [out, in]."""
    h, m, kv = shape.hidden, shape.intermediate, shape.hidden // shape.heads * shape.kv_heads
    attention = {f"self_attn.{name}_proj": (kv if name in "kv" else h, h) for name in "qkvo"}
    if not shape.experts:
        return attention | {"mlp.gate_proj": (m, h), "mlp.up_proj": (m, h), "mlp.down_proj": (h, m)}
    sizes = {"w1": (m, h), "w2": (h, m), "w3": (m, h)}
    experts = {
        f"block_sparse_moe.experts.{n}.{name}": size for n in range(shape.experts) for name, size in sizes.items()
    }
    return attention | {"block_sparse_moe.gate": (shape.experts, h)} | experts


def _tensors(matrices: dict[str, tuple[int, int]], norms: Sequence[str], hidden: int) -> dict[str, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = {
        f"{name}.weight": (torch.randn(size, device=device) * 0.02).half().cpu() for name, size in matrices.items()
    }
    return drawn | {f"{name}.weight": torch.ones(hidden, dtype=torch.float16) for name in norms}
