"""What the benchmarks share: prompts, reading an artifact as a float32 model, counting what it stores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The quick brown fox jumps over the",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "The largest planet in our solar system is",
    "To be, or not to be, that is the",
    "In 1969, Neil Armstrong became the first person to walk on the",
    "My favourite food is pizza because",
    "The opposite of hot is",
    "A triangle has three sides and a square has",
    "The chemical symbol of gold is",
    "import numpy as np\n\nx = np.",
    "Dear Sir or Madam,\n\nI am writing to",
    "The recipe needs two eggs, a cup of flour and a pinch of",
    "The three primary colours are red, blue and",
    "She opened the door and saw",
    "Monday, Tuesday, Wednesday, Thursday,",
    "The theory of evolution was proposed by Charles",
    "1, 2, 3, 4, 5, 6,",
    "An apple a day keeps the doctor",
    "The train from London to Edinburgh takes about",
    "Shakespeare wrote the play Romeo and",
    "In computer science, a stack is a data structure that",
    "The human heart pumps",
    "For sale: a bicycle in good condition,",
    "The meeting has been moved to next",
    "Photosynthesis is the process by which plants",
    "He was so tired that he",
    "The Great Wall of China was built to",
    "Translate to German: Good morning. Guten",
    "The square root of sixteen is",
)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def describe(directory: Path) -> str:
    """An artifact's format in a few words: "gptq 4-bit g128 sym", "compressed-tensors W4A16 int g64 sym", "GGUF"."""
    if directory.is_file():
        return "GGUF"
    config = read_config(directory)
    quantization = config.get("quantization_config")
    if not quantization:
        return f"dense {config.get('dtype') or config.get('torch_dtype')}"
    method = quantization["quant_method"]
    if method == "compressed-tensors":
        group = next(iter(quantization["config_groups"].values()))
        weights, activations = group["weights"], group.get("input_activations")
        kind = f"W{weights['num_bits']}A{activations['num_bits'] if activations else 16} {weights['type']}"
        weights = {"group_size": None, **weights}
        size = f"g{weights['group_size']}" if weights.get("group_size") else weights["strategy"]
        return f"compressed-tensors {kind} {size} {'sym' if weights['symmetric'] else 'asym'}"
    if method == "bitsandbytes":
        return f"bitsandbytes {quantization.get('bnb_4bit_quant_type') or 'int8'}"
    if method == "hqq":
        grid = quantization["quant_config"]["weight_quant_params"]
        return f"hqq {grid['nbits']}-bit g{grid['group_size']} asym" + (" across rows" if grid["axis"] == 0 else "")
    bits, size = quantization.get("bits", "?"), quantization.get("group_size", "?")
    order = " desc_act" if quantization.get("desc_act") else ""
    return f"{method} {bits}-bit g{size} {'sym' if quantization.get('sym') else 'asym'}{order}"


def dense_model(directory: Path, configured: Path | None = None) -> Any:
    """A Hugging Face directory, quantized or not, as a transformers model with dequantized float32 weights; or a GGUF file,
    with the configuration of another directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowbit.core.checkpoint import open_checkpoint
    from lowbit.formats.reader import open_artifact

    config = AutoConfig.from_pretrained(configured or directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    checkpoint = open_artifact(open_checkpoint(directory), torch.float32)
    state = {name: checkpoint.read(name).float() for name in checkpoint.tensors}
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - tied:
        raise SystemExit(f"{directory}: missing {sorted(set(missing) - tied)[:3]}, unexpected {unexpected[:3]}")
    model.tie_weights()
    return model


def stored_bits(directory: Path, base: Path) -> tuple[float | None, float]:
    """(bits a weight of the quantized layers, MiB of all safetensors or the GGUF file); None when no layer is quantized.

    Counts every stored tensor of a layer: packed weights, scales, zero points, group indices, padding. `base` is the
    dense checkpoint, which has the layers' shapes.
    """
    if directory.is_file():
        return _gguf_bits(directory), directory.stat().st_size / 2**20
    stored, dense = _headers(directory), _headers(base)
    marks = (".qweight", ".weight_packed", ".weight_scale", ".weight.absmax", ".W_q")
    layers = {name.removesuffix(mark) for name in stored for mark in marks if name.endswith(mark)}
    # bitsandbytes keeps what belongs to a weight under the weight's own name
    parts = {name: name.replace(".weight.", ".weight_").rpartition(".") for name in stored}
    layer_bytes = sum(stored[name][1] for name, (path, _, leaf) in parts.items() if path in layers and leaf != "bias")
    weights = sum(math.prod(dense[f"{layer}.weight"][0]) for layer in layers)
    mib = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 2**20
    return (8 * layer_bytes / weights if weights else None), mib


def _gguf_bits(file: Path) -> float:
    from gguf import GGUFReader

    layers = [
        tensor for tensor in GGUFReader(file).tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    ]
    return 8 * sum(int(one.n_bytes) for one in layers) / sum(int(one.n_elements) for one in layers)


def _headers(directory: Path) -> dict[str, tuple[list[int], int]]:
    """Tensor name -> (shape, bytes), of all safetensors files."""
    out = {}
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        out.update(
            {
                name: (entry["shape"], entry["data_offsets"][1] - entry["data_offsets"][0])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        )
    return out
