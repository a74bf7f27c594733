"""How long does a Llama-2-7B-shaped model take on this GPU (or CPU)?

Writes random checkpoints of that shape with a few layers (time does not depend on the values), quantizes each, and prints
seconds, seconds a layer from the difference, what 32 layers would take, and peak memory.

    .venv/bin/python benchmarks/gpu_7b.py --layers 2,6 --method gptq
    .venv/bin/python benchmarks/gpu_7b.py --hidden 8192 --intermediate 28672 --heads 64 --kv-heads 8 --layers 2,4
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import lowbit
from lowbit.api.run import Settings


def main() -> None:
    arguments = _arguments()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        root = Path(folder)
        text = _write_text(root / "text.txt", arguments.samples * arguments.tokens)
        for layers in arguments.layers:
            model = root / f"model-{layers}"
            _write_model(model, layers, arguments)
            if not rows:  # the first run pays for starting CUDA and compiling kernels: not counted
                _quantize(model, root / "warm", text, arguments, samples=16)
            rows.append((layers, *_quantize(model, root / "out", text, arguments, samples=arguments.samples)))
            shutil.rmtree(model)
    _print(rows, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=lambda text: [int(n) for n in text.split(",")], default=[2, 6])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the method, as JSON")
    parser.add_argument("--not-sequential", action="store_true", help="watch all layers of a block at once")
    parser.add_argument("--dir", help="where checkpoints are written (default: the system's temporary directory)")
    return parser.parse_args()


def _write_text(file: Path, tokens: int) -> Path:
    """Random words; the tokenizer below gives one token for each."""
    words = torch.randint(3, 3000, (tokens + 1000,), generator=torch.Generator().manual_seed(0))
    file.write_text(" ".join(f"w{n}" for n in words.tolist()))
    return file


def _write_model(folder: Path, layers: int, arguments: argparse.Namespace) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir()
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    )
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(arguments.vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    h, m, kv = arguments.hidden, arguments.intermediate, arguments.hidden // arguments.heads * arguments.kv_heads
    shapes = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (m, h), "up": (m, h), "down": (h, m)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    outside = {"model.embed_tokens": (arguments.vocabulary, h), "lm_head": (arguments.vocabulary, h)}
    weight_map = {}

    def write(file: str, named: dict[str, tuple[int, int]], norms: list[str]) -> None:
        tensors = {
            f"{name}.weight": (torch.randn(shape, device=device) * 0.02).half().cpu() for name, shape in named.items()
        }
        tensors |= {f"{name}.weight": torch.ones(h, dtype=torch.float16) for name in norms}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    write("outside.safetensors", outside, ["model.norm"])
    for i in range(layers):
        prefix = f"model.layers.{i}"
        named = {
            f"{prefix}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj": shape for name, shape in shapes.items()
        }
        write(f"layer{i}.safetensors", named, [f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _quantize(
    model: Path, output: Path, text: Path, arguments: argparse.Namespace, samples: int
) -> tuple[float, dict[str, float]]:
    options = dict(pair.split("=", 1) for pair in arguments.option)
    started = time.perf_counter()
    result = lowbit.quantize(
        model,
        output=output,
        method=arguments.method,
        dataset=str(text),
        num_samples=samples,
        seq_len=arguments.tokens,
        sequential=False if arguments.not_sequential else None,
        options={name: json.loads(value) for name, value in options.items()} or None,
        settings=Settings(verify=False),
    )
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    return seconds, result.run["peak_memory_mib"]


def _print(rows: list[tuple[int, float, dict[str, float]]], arguments: argparse.Namespace) -> None:
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"lowbit {lowbit.__version__}, torch {torch.__version__}, {place}; {arguments.method}, ", end="")
    print(f"{arguments.samples} x {arguments.tokens} tokens, hidden {arguments.hidden}, {arguments.intermediate}")
    print("| layers | seconds | GPU peak GiB | resident peak GiB |\n|---|---|---|---|")
    for layers, seconds, peak in rows:
        gpu = f"{peak['gpu'] / 1024:.1f}" if "gpu" in peak else "-"
        print(f"| {layers} | {seconds:.1f} | {gpu} | {peak['resident'] / 1024:.1f} |")
    if len(rows) > 1:
        (few, short, _), (many, long, _) = rows[0], rows[-1]
        each = (long - short) / (many - few)
        print(f"{each:.2f} s a layer, so {short + (32 - few) * each:.0f} s for 32 layers, files included")


if __name__ == "__main__":
    main()
