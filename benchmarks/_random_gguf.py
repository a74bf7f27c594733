"""An F16 GGUF file of random numbers in the shape of Llama-2-7B's blocks; no tokenizer, so it can be encoded but not run."""

from __future__ import annotations

from pathlib import Path

import torch

from lowbit.formats.gguf import PlannedTensor, lay_out, number_pair, text_pair
from lowbit.pipeline.gguf_writer import GgufWriter

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000


def write_blocks(folder: Path, layers: int) -> Path:
    """The file, in `folder`."""
    writer = GgufWriter(folder, lay_out("source.gguf", _metadata(layers), _tensors(layers)))
    noise = torch.randn(VOCABULARY * HIDDEN, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for tensor in _tensors(layers):
        values = noise[: tensor.shape[0] * (tensor.shape[1] if len(tensor.shape) > 1 else 1)]
        stored = values.half() if tensor.ggml_type == "F16" else values
        writer.write(tensor.name, stored.view(torch.uint8))
    writer.sync()
    return folder / "source.gguf"


def _tensors(layers: int) -> list[PlannedTensor]:
    square, wide, tall = (HIDDEN, HIDDEN), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)
    parts = {"attn_q": square, "attn_k": square, "attn_v": square, "attn_output": square}
    parts |= {"ffn_gate": tall, "ffn_up": tall, "ffn_down": wide}
    found = [PlannedTensor("token_embd.weight", (VOCABULARY, HIDDEN), "F16")]
    for block in range(layers):
        found += [PlannedTensor(f"blk.{block}.{name}.weight", shape, "F16") for name, shape in parts.items()]
        found += [PlannedTensor(f"blk.{block}.{name}.weight", (HIDDEN,), "F32") for name in ("attn_norm", "ffn_norm")]
    found.append(PlannedTensor("output_norm.weight", (HIDDEN,), "F32"))
    return [*found, PlannedTensor("output.weight", (VOCABULARY, HIDDEN), "F16")]


def _metadata(layers: int) -> dict[str, bytes]:
    numbers = {
        "block_count": layers, "context_length": 4096, "embedding_length": HIDDEN, "feed_forward_length": INTERMEDIATE,
        "attention.head_count": 32, "attention.head_count_kv": 32,
    }  # fmt: skip
    pairs = {f"llama.{name}": number_pair(f"llama.{name}", value) for name, value in numbers.items()}
    return {"general.architecture": text_pair("general.architecture", "llama"), **pairs}
