"""Seconds to encode an unquantized GGUF file, without statistics: lowbit, and llama-quantize where it is on PATH.

    python benchmarks/gguf_speed.py SOURCE.gguf [--types q4_k_m q3_k_s] [--threads 2] [--device cpu] [--rounds 3]
    python benchmarks/gguf_speed.py --random-layers 32 --types q4_k_m --device cuda --threads 8

--random-layers: instead of a file, random numbers in the shape of that many of Llama-2-7B's blocks (13.5 GB for all 32).
Both read the same file and write a file of the same types; the best of the rounds counts. lowbit's time is that of the
encoding in a process that has torch loaded already, and of writing, with every byte on the disk (fsync).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from _random_gguf import write_blocks

from lowbit.api.quantize import quantize
from lowbit.api.run import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--random-layers", type=int)
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q3_k_s"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.random_layers:
            args.source = write_blocks(Path(folder), args.random_layers)
        compare(args)


def compare(args: argparse.Namespace) -> None:
    program = shutil.which("llama-quantize")
    for kind in args.types:
        ours = min(lowbit_seconds(args, kind) for _ in range(args.rounds))
        line = f"{kind:8} lowbit {ours:7.2f} s ({args.device}, {args.threads} threads)"
        if program is not None:
            theirs = min(llama_seconds(program, args, kind) for _ in range(args.rounds))
            line += f"   llama-quantize {theirs:7.2f} s   ratio {ours / theirs:.2f}"
        print(line, flush=True)


def lowbit_seconds(args: argparse.Namespace, kind: str) -> float:
    with tempfile.TemporaryDirectory(dir=args.source.parent) as folder:
        settings = Settings(device=args.device, verify=False)
        result = quantize(args.source, output=Path(folder) / "out.gguf", method=kind, settings=settings)
        return float(result.run["seconds"])


def llama_seconds(program: str, args: argparse.Namespace, kind: str) -> float:
    with tempfile.TemporaryDirectory(dir=args.source.parent) as folder:
        command = [program, str(args.source), str(Path(folder) / "out.gguf"), kind.upper(), str(args.threads)]
        started = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        return time.monotonic() - started


if __name__ == "__main__":
    main()
