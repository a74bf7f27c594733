"""GGUF files of one model side by side: plain, with an importance matrix, rounded to second order, with fitted types
(`lowbit fit`), with `--effort best` in llama.cpp's types (own-types) and in fitted ones (best), without trained codes and with;
and llama.cpp's own llama-quantize, without and with llama-imatrix on the same text, where those programs
are on PATH.

    python benchmarks/gguf_quality.py --model DIR --text FILE --evaluate FILE [--types q4_k_m q3_k_s] [--out DIR]
    python benchmarks/gguf_quality.py ... --rows imatrix hessian best-codes --samples 128 --seq-len 1024      # on a GPU

Prints one line a file: bytes, seconds, KL divergence from the base with its standard error, and top-1 agreement; then the
same for every further text to measure on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from lowbit.api.evaluate import evaluate
from lowbit.api.fit import fit
from lowbit.api.gguf_conversion import converted
from lowbit.api.quantize import quantize
from lowbit.api.run import Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.progress import Silent
from lowbit.recipe import Calibration

ROWS = ("none", "imatrix", "hessian", "fit", "own-types", "own-types-codes", "best", "best-codes")
_BEST = ("own-types", "best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--evaluate", nargs="+", required=True, help="texts to measure on (files, pydoc)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["none", "imatrix", "hessian", "fit"])
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q3_k_s"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("gguf-quality"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source = converted(open_checkpoint(args.model), args.out, Silent()).location
    for kind in args.types:
        for row in args.rows:
            make = fitted if row == "fit" else best if row.startswith(_BEST) else ours
            report(f"lowbit {kind} {row}", *make(args, kind, row), args)
        for name, command, file in theirs(args, source, kind):
            started = time.monotonic()
            subprocess.run(command, check=True, capture_output=True)
            report(name, file, time.monotonic() - started, args)


def fitted(args: argparse.Namespace, kind: str, row: str) -> tuple[Path, float]:
    """A file no larger than the file type's, every tensor of the type that `lowbit fit` chose."""
    started = time.monotonic()
    text = Calibration(dataset=str(args.text), num_samples=args.samples // 2, seq_len=min(512, args.seq_len))
    recipe = fit(args.model, like=kind, calibration=text).recipe
    recipe = recipe.updated(num_samples=args.samples, seq_len=args.seq_len)
    output = args.out / f"lowbit-{kind}-{row}.gguf"
    quantize(args.model, output=output, recipe=recipe, settings=Settings(verify=False, restart=True))
    return output, time.monotonic() - started


def best(args: argparse.Namespace, kind: str, row: str) -> tuple[Path, float]:
    fits = not row.startswith("own-types")
    return written(args, kind, row, {"fit_types": fits}, effort="best", tune_codes=row.endswith("codes"))


def ours(args: argparse.Namespace, kind: str, row: str) -> tuple[Path, float]:
    return written(args, kind, row, {"refine": row})


def written(
    args: argparse.Namespace, kind: str, row: str, options: dict[str, Any], **further: Any
) -> tuple[Path, float]:
    output = args.out / f"lowbit-{kind}-{row}.gguf"
    text = {} if row == "none" else {"dataset": str(args.text), "num_samples": args.samples, "seq_len": args.seq_len}
    # text that the model writes counts, so none that an earlier row wrote is taken
    settings = Settings(verify=False, restart=True, texts=output.with_suffix(".texts"))
    result = quantize(args.model, output=output, method=kind, settings=settings, options=options, **further, **text)
    return output, result.run["seconds"]


def theirs(args: argparse.Namespace, source: Path, kind: str) -> list[tuple[str, list[str], Path]]:
    """llama.cpp's programs, in the order in which they must run; the importance matrix is made once."""
    program, collector = shutil.which("llama-quantize"), shutil.which("llama-imatrix")
    if program is None:
        return []
    plain = args.out / f"llama-{kind}.gguf"
    runs = [(f"llama-quantize {kind}", [program, str(source), str(plain), kind.upper()], plain)]
    matrix = args.out / "llama.imatrix.gguf"
    if collector is not None and not matrix.exists():
        chunks = ["--chunks", str(args.samples), "-c", str(args.seq_len)]
        subprocess.run(
            [collector, "-m", str(source), "-f", str(args.text), "-o", str(matrix), *chunks],
            check=True,
            capture_output=True,
        )
    if matrix.exists():
        weighted = args.out / f"llama-{kind}-imatrix.gguf"
        command = [program, "--imatrix", str(matrix), str(source), str(weighted), kind.upper()]
        runs.append((f"llama-quantize {kind} imatrix", command, weighted))
    return runs


def report(name: str, file: Path, seconds: float, args: argparse.Namespace) -> None:
    print(f"{name:36} {file.stat().st_size:>12} bytes {seconds:8.1f} s", end="", flush=True)
    for text in args.evaluate:
        measured = evaluate(file, base=args.model, dataset=text, windows=args.windows, context=1024)
        print(f"  KL {measured.kl:.5f} ± {measured.kl_error:.5f}  top-1 {measured.top1:.4f}", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
