"""A GGUF file of a tiny llama checkpoint, written with gguf-py alone: names, rope's row order and metadata as llama.cpp's
converter gives them (convert_hf_to_gguf.py, LlamaModel), so that product code is compared with something else."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def gguf_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Tensors under their GGUF names, as stored in an F16 file."""
    config = json.loads((folder / "config.json").read_text())
    out = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem in ("model.embed_tokens", "model.norm", "lm_head"):
            short = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem]
        else:
            _, _, block, rest = stem.split(".", 3)
            short = f"blk.{block}.{_NAMES[rest]}"
        if short.endswith("attn_q"):
            weight = permuted(weight, config["num_attention_heads"])
        elif short.endswith("attn_k"):
            weight = permuted(weight, config["num_key_value_heads"])
        out[f"{short}.weight"] = weight.astype(np.float32 if weight.ndim == 1 else np.float16)
    return out


def write_gguf(folder: Path, file: Path) -> Path:
    """The checkpoint in `folder` as an F16 GGUF `file`."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_file_type(1)
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config["vocab_size"])
    for name, tensor in gguf_tensors(folder).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict, size: int) -> None:
    vocabulary = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = [special.get(i, vocabulary.get(i, f"[PAD{i}]")) for i in range(size)]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(size)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
