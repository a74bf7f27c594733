"""Peak memory of quantizing does not grow with the number of layers.

    .venv/bin/python benchmarks/memory.py                      # Llama-2-7B's shapes, 2 and 6 layers: 4 GiB of disk
    .venv/bin/python benchmarks/memory.py --hidden 1024 --intermediate 2816 --heads 8 --group-size 64      # quicker

Makes checkpoints of random numbers, runs `lowbit quantize` on each in a process of its own and prints the peak resident
memory that the kernel reports for that process (pages of files mapped into memory count too).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Nothing big is imported or made in this process: Linux counts a parent's memory at the fork as its child's.
from _table import print_table


def main() -> None:
    args = parse()
    if args.make:
        make_checkpoint(args.make, args.layers[0], args)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        for layers in args.layers:
            model, output = Path(scratch) / f"random-{layers}", Path(scratch) / f"quantized-{layers}"
            print(f"making a checkpoint of {layers} layers ...", file=sys.stderr, flush=True)
            subprocess.run(
                [sys.executable, __file__, *shape_flags(args), "--layers", str(layers), "--make", model], check=True
            )
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            print(f"quantizing {layers} layers ...", file=sys.stderr, flush=True)
            peak, seconds = measure(quantize_command(model, output, args))
            rows.append({
                "layers": layers, "checkpoint_MiB": size >> 20, "block_MiB": block_bytes(args) >> 20,
                "method": args.method, "tokens": f"{args.num_samples} x {args.seq_len}",
                "peak_MiB": peak, "seconds": round(seconds),
            })  # fmt: skip
    print_table(rows)


def quantize_command(model: Path, output: Path, args: argparse.Namespace) -> list[str]:
    """The command line that anyone would type."""
    return [
        str(Path(sys.executable).with_name("lowbit")), "quantize", str(model), "--output", str(output),
        "--method", args.method, "--bits", "4", "--group-size", str(args.group_size), "--dataset", "pydoc",
        "--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len), "--no-verify", *args.extra,
    ]  # fmt: skip


def measure(command: list[str]) -> tuple[int, float]:
    """Run a command; (its own peak resident memory in MiB, seconds). Exits with its last words if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\nfailed:\n{log.read()[-3000:]}")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert usage.ru_maxrss > own, "the measured peak is this script's own"
    return usage.ru_maxrss // 1024, seconds


def make_checkpoint(directory: Path, layers: int, args: argparse.Namespace) -> None:
    """A random llama checkpoint in float16, written tensor by tensor, and a tokenizer of bytes."""
    import numpy

    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16", "hidden_size": args.hidden,
        "intermediate_size": args.intermediate, "num_attention_heads": args.heads, "num_key_value_heads": args.heads,
        "num_hidden_layers": layers, "vocab_size": args.vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    shapes = dict(tensor_shapes(layers, args))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    random = numpy.random.default_rng(0)
    with (directory / "model.safetensors").open("wb") as stream:
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape in shapes.values():
            if len(shape) == 1:
                values = numpy.ones(shape, numpy.float16)
            else:
                values = (random.standard_normal(shape, numpy.float32) * numpy.float32(0.02)).astype(numpy.float16)
            stream.write(values.tobytes())
    make_tokenizer(directory)


def tensor_shapes(layers: int, args: argparse.Namespace) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of a llama checkpoint."""
    hidden, inner = args.hidden, args.intermediate
    yield "model.embed_tokens.weight", [args.vocab, hidden]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", [hidden, hidden]
        yield f"{prefix}.mlp.gate_proj.weight", [inner, hidden]
        yield f"{prefix}.mlp.up_proj.weight", [inner, hidden]
        yield f"{prefix}.mlp.down_proj.weight", [hidden, inner]
        yield f"{prefix}.input_layernorm.weight", [hidden]
        yield f"{prefix}.post_attention_layernorm.weight", [hidden]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [args.vocab, hidden]


def make_tokenizer(directory: Path) -> None:
    """One token a byte: any text can be tokenized, and nothing needs a download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<s>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(directory)


def block_bytes(args: argparse.Namespace) -> int:
    """Bytes of one decoder block in float16."""
    return 2 * sum(math.prod(shape) for name, shape in tensor_shapes(1, args) if name.startswith("model.layers."))


def shape_flags(args: argparse.Namespace) -> list[str]:
    """The flags that give another process of this script the same shapes."""
    return [f"--{name}={getattr(args, name)}" for name in ("hidden", "intermediate", "heads", "vocab")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6], help="numbers of layers (default 2 6)")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=16, help="calibration windows (default 16)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window (default 512)")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--work", type=Path, help="where the checkpoints are made (default: the temporary directory)")
    parser.add_argument("--make", type=Path, metavar="DIR", help="only make the first checkpoint there")
    parser.add_argument("extra", nargs="*", help="after --: further flags of lowbit quantize")
    return parser.parse_args()


if __name__ == "__main__":
    main()
