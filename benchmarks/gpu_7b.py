"""How long does a Llama-2-7B-shaped model take on this GPU, or on several, and how long with llm-compressor?

Writes random checkpoints of that shape with a few layers (time does not depend on the values), quantizes each, and prints
seconds, seconds a layer from the difference, what all layers would take, and peak memory. Seconds run from files to files;
stages are parts of them. With several numbers of GPUs every run is a program of its own: each pays for starting CUDA.
`--experts` makes the shape Mixtral's. `--trace` also says where the time of a GPU goes.

Where `lowbit env add llm-compressor` was run, that follows each run of ours on one GPU: the same checkpoint, the same windows
of text, the same bits, groups and zero points; how each searches is its own, and llm-compressor's AWQ computes in bfloat16
because float16 is too small for it. It is a program of its own: imports and cutting the text into tokens are not counted,
starting CUDA is, once in the seconds of all layers and not in a layer's. Ours counts the text, and comes in this process
after a run that is not counted; with several numbers of GPUs it starts CUDA too.

    .venv/bin/python benchmarks/gpu_7b.py --layers 2,6 --method gptq,awq,fp8
    .venv/bin/python benchmarks/gpu_7b.py --hidden 8192 --intermediate 28672 --heads 64 --kv-heads 8 --layers 2,4 --whole 80
    .venv/bin/python benchmarks/gpu_7b.py --layers 2,6 --gpus 1,2
    .venv/bin/python benchmarks/gpu_7b.py --layers 2,6 --method q4_k_m:refine=none,q4_k_m
    .venv/bin/python benchmarks/gpu_7b.py --layers 1,2 --intermediate 14336 --kv-heads 8 --experts 8 --experts-per-token 2
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from _gpu_rows import PEER, Row, Source, methods_with_peer, ours, peer
from _random_model import Shape, write_model, write_text

import lowbit


def main() -> None:
    arguments = _arguments()
    shape = Shape(**{field.name: getattr(arguments, field.name) for field in fields(Shape)})
    with_peer = methods_with_peer(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        text = write_text(Path(folder) / "text.txt", arguments.samples * arguments.tokens, shape)
        for number, layers in enumerate(arguments.layers):
            source = Source(Path(folder) / f"model-{layers}", layers, text)
            write_model(source.model, layers, shape)
            for method in arguments.method:
                for gpus in arguments.gpus:
                    if number == 0:  # the first run pays for starting CUDA and compiling kernels: not counted
                        ours(source, arguments, method, gpus, samples=min(16, arguments.samples))
                    rows += _told(ours(source, arguments, method, gpus, samples=arguments.samples))
                    if gpus == 1 and method in with_peer:
                        rows += _told(peer(source, arguments, method))
            if arguments.trace and number == 0:
                _trace(source, arguments)
            shutil.rmtree(source.model)
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
    parser.add_argument(
        "--experts", type=int, default=0, help="of a Mixtral-shaped model (default: a Llama-shaped one)"
    )
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32000, help="300 or more")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--method",
        type=lambda text: text.split(","),
        default=["gptq"],
        metavar="METHOD[:OPTION=VALUE...],...",
        help="one or more, with commas, each with its own options, as in q4_k_m:refine=none,gptq:percdamp=0.05",
    )
    parser.add_argument("--group-size", type=int, help="columns that share a scale (default: the method's)")
    parser.add_argument("--gpus", type=numbers, default=[1], help="one or more numbers, with commas")
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="llm-compressor in turn, for gptq, awq, fp8, int8 and rtn without options, on 1 GPU; not with --experts, which "
        "its scripts here do not cover",
    )
    parser.add_argument("--not-sequential", action="store_true", help="watch all layers of a block at once")
    parser.add_argument(
        "--trace", metavar="FILE", help="write a profile of the first method's first run (for perfetto)"
    )
    parser.add_argument("--dir", help="where checkpoints are written (default: the system's temporary directory)")
    return parser.parse_args()


def _told(row: Row | None) -> list[Row]:
    """The row, if there is one, once it was said on stderr."""
    if row is None:
        return []
    print(f"{row.name}, {row.layers} layers: {row.seconds:.1f} s{row.found}", file=sys.stderr, flush=True)
    return [row]


def _trace(source: Source, arguments: argparse.Namespace) -> None:
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        ours(source, arguments, arguments.method[0], gpus=1, samples=arguments.samples)
    profiler.export_chrome_trace(arguments.trace)
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=70))


def _print(rows: list[Row], arguments: argparse.Namespace) -> None:
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"lowbit {lowbit.__version__}, torch {torch.__version__}, {place}; ", end="")
    print(
        f"{arguments.samples} x {arguments.tokens} tokens, hidden {arguments.hidden}, {arguments.intermediate}", end=""
    )
    print(f", {arguments.experts} experts, {arguments.experts_per_token} a token" if arguments.experts else "")
    print("| method | GPUs | layers | seconds | GPU peak GiB | resident peak GiB | stages, s |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        gpu = f"{row.peak['gpu'] / 1024:.1f}" if "gpu" in row.peak else "-"
        cells = [
            row.quantizer,
            row.gpus,
            row.layers,
            f"{row.seconds:.1f}",
            gpu,
            f"{row.peak['resident'] / 1024:.1f}",
            _seconds(row.stages) or "-",
        ]
        print(f"| {' | '.join(map(str, cells))} |")
    for name in dict.fromkeys(row.name for row in rows if not row.peer):
        _print_whole(name, rows, arguments.whole)
    alone = {(row.quantizer, row.layers): row for row in rows if row.gpus == 1}
    for row in rows:
        if row.gpus > 1 and (row.quantizer, row.layers) in alone:
            _print_beside(row, alone[row.quantizer, row.layers])


def _print_beside(row: Row, alone: Row) -> None:
    """How much sooner several GPUs are done than one, and whether what they made is as good."""
    print(f"{row.name}, {row.layers} layers: {alone.seconds / row.seconds:.2f} times as fast as one GPU", end="")
    shares = [row.errors[path] / error for path, error in alone.errors.items()]
    if shares:
        print(f"; layers' errors are {statistics.fmean(shares):.4f} of one's", end="")
        print(f" on average, {min(shares):.4f} to {max(shares):.4f}", end="")
    print()


def _print_whole(name: str, rows: list[Row], layers: int) -> None:
    """Ours of that name, the peer's, and what the peer's seconds are of ours."""
    mine, theirs = (_reckoned([row for row in rows if row.name == each], layers) for each in (name, f"{PEER} {name}"))
    for whole in filter(None, (mine, theirs)):
        print(f"{whole.name}: {whole.each:.2f} s a layer, so {whole.all:.0f} s for {layers}, files included", end="")
        print(f" ({_seconds(whole.stages)})" if whole.stages else "")
    if mine is None or theirs is None:
        return
    if min(mine.each, theirs.each) <= 0:
        print(f"{name}: layers take too little time here for a ratio")
        return
    print(f"{name}: {PEER} takes {theirs.each / mine.each:.1f} times as long a layer, ", end="")
    print(f"{theirs.all / mine.all:.1f} times for {layers} layers")


@dataclass(frozen=True)
class _Whole:
    """Seconds of a layer more, of all layers, and of all layers' stages."""

    name: str
    each: float
    all: float
    stages: dict[str, float]


def _reckoned(rows: list[Row], layers: int) -> _Whole | None:
    """From the first and the last of one name's rows; None where they do not differ in layers."""
    if not rows or rows[0].layers == rows[-1].layers:
        return None
    first, last = rows[0], rows[-1]

    def reckoned(few: float, many: float) -> tuple[float, float]:
        each = (many - few) / (last.layers - first.layers)
        return each, few + (layers - first.layers) * each

    stages = {what: reckoned(seconds, last.stages[what])[1] for what, seconds in first.stages.items()}
    return _Whole(first.name, *reckoned(first.seconds, last.seconds), stages)


def _seconds(stages: dict[str, float]) -> str:
    return ", ".join(f"{what} {seconds:.1f}" for what, seconds in stages.items())


if __name__ == "__main__":
    main()
