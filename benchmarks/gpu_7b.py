"""How long does a Llama-2-7B-shaped model take on this GPU, or on several?

Writes random checkpoints of that shape with a few layers (time does not depend on the values), quantizes each, and prints
seconds, seconds a layer from the difference, what all layers would take, and peak memory. `--trace` also says where the
time of a GPU goes.

    .venv/bin/python benchmarks/gpu_7b.py --layers 2,6 --method gptq,awq,fp8
    .venv/bin/python benchmarks/gpu_7b.py --hidden 8192 --intermediate 28672 --heads 64 --kv-heads 8 --layers 2,4 --whole 80
    .venv/bin/python benchmarks/gpu_7b.py --layers 2,6 --gpus 1,2
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import lowbit
from lowbit.api.run import Settings

Row = tuple[str, int, int, float, dict[str, float]]


def main() -> None:
    arguments = _arguments()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        root = Path(folder)
        text = _write_text(root / "text.txt", arguments.samples * arguments.tokens)
        for number, layers in enumerate(arguments.layers):
            model = root / f"model-{layers}"
            _write_model(model, layers, arguments)
            for method in arguments.method:
                for gpus in arguments.gpus:
                    if number == 0:  # the first run pays for starting CUDA and compiling kernels: not counted
                        _quantize(model, root, text, arguments, method, gpus, samples=16)
                    seconds, peak = _quantize(model, root, text, arguments, method, gpus, samples=arguments.samples)
                    rows.append((method, gpus, layers, seconds, peak))
                    print(f"{method}, {gpus} GPU, {layers} layers: {seconds:.1f} s", file=sys.stderr, flush=True)
            if arguments.trace and number == 0:
                _trace(model, root, text, arguments)
            shutil.rmtree(model)
    _print(rows, arguments)


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=numbers, default=[2, 6])
    parser.add_argument("--whole", type=int, default=32, help="layers of the whole model")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--method", type=lambda text: text.split(","), default=["gptq"], help="one or more, with commas"
    )
    parser.add_argument("--gpus", type=numbers, default=[1], help="one or more numbers, with commas")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the method, as JSON")
    parser.add_argument("--not-sequential", action="store_true", help="watch all layers of a block at once")
    parser.add_argument(
        "--trace", metavar="FILE", help="write a profile of the first method's first run (for perfetto)"
    )
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
    model: Path, root: Path, text: Path, arguments: argparse.Namespace, method: str, gpus: int, samples: int
) -> tuple[float, dict[str, float]]:
    """(seconds from files to files, peaks). Several GPUs: seconds without starting Python and CUDA."""
    output = root / ("out.gguf" if method.startswith("q") and "_" in method else "out")
    if gpus > 1:
        cost = _by_command(model, output, text, arguments, method, gpus, samples)
    else:
        options = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in arguments.option)}
        started = time.perf_counter()
        result = lowbit.quantize(
            model,
            output=output,
            method=method,
            dataset=str(text),
            num_samples=samples,
            seq_len=arguments.tokens,
            sequential=False if arguments.not_sequential else None,
            options=options or None,
            settings=Settings(verify=False),
        )
        cost = result.run | {"seconds": time.perf_counter() - started}
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink()
    torch.cuda.empty_cache()
    return cost["seconds"], cost["peak_memory_mib"]


def _by_command(
    model: Path, output: Path, text: Path, arguments: argparse.Namespace, method: str, gpus: int, samples: int
) -> dict[str, Any]:
    command = [sys.executable, "-m", "lowbit", "quantize", str(model), "-o", str(output), "--method", method]
    command += ["--dataset", str(text), "--num-samples", str(samples), "--seq-len", str(arguments.tokens)]
    command += ["--gpus", str(gpus), "--no-verify", "--json"]
    command += [part for pair in arguments.option for part in ("--option", pair)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    cost: dict[str, Any] = json.loads(done.stdout)["run"]
    return cost


def _trace(model: Path, root: Path, text: Path, arguments: argparse.Namespace) -> None:
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        _quantize(model, root, text, arguments, arguments.method[0], 1, samples=arguments.samples)
    profiler.export_chrome_trace(arguments.trace)
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=70))


def _print(rows: list[Row], arguments: argparse.Namespace) -> None:
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"lowbit {lowbit.__version__}, torch {torch.__version__}, {place}; ", end="")
    print(f"{arguments.samples} x {arguments.tokens} tokens, hidden {arguments.hidden}, {arguments.intermediate}")
    print("| method | GPUs | layers | seconds | GPU peak GiB | resident peak GiB |\n|---|---|---|---|---|---|")
    for method, gpus, layers, seconds, peak in rows:
        gpu = f"{peak['gpu'] / 1024:.1f}" if "gpu" in peak else "-"
        print(f"| {method} | {gpus} | {layers} | {seconds:.1f} | {gpu} | {peak['resident'] / 1024:.1f} |")
    for method in arguments.method:
        for gpus in arguments.gpus:
            own = [row for row in rows if row[:2] == (method, gpus)]
            if len(own) < 2:
                continue
            (_, _, few, short, _), (_, _, many, long, _) = own[0], own[-1]
            each = (long - short) / (many - few)
            whole = short + (arguments.whole - few) * each
            print(f"{method}, {gpus} GPU: {each:.2f} s a layer, so {whole:.0f} s for {arguments.whole}, files included")


if __name__ == "__main__":
    main()
