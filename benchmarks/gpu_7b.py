"""How long does a Llama-2-7B-shaped model take on this GPU, or on several?

Writes random checkpoints of that shape with a few layers (time does not depend on the values), quantizes each, and prints
seconds, seconds a layer from the difference, what all layers would take, and peak memory. Seconds run from files to files;
stages are parts of them. With several numbers of GPUs every run is a program of its own: each pays for starting CUDA.
`--experts` makes the shape Mixtral's. `--trace` also says where the time of a GPU goes.

    .venv/bin/python benchmarks/gpu_7b.py --layers 2,6 --method gptq,awq,fp8
    .venv/bin/python benchmarks/gpu_7b.py --hidden 8192 --intermediate 28672 --heads 64 --kv-heads 8 --layers 2,4 --whole 80
    .venv/bin/python benchmarks/gpu_7b.py --layers 2,6 --gpus 1,2
    .venv/bin/python benchmarks/gpu_7b.py --layers 2,6 --method q4_k_m:refine=none,q4_k_m
    .venv/bin/python benchmarks/gpu_7b.py --layers 1,2 --intermediate 14336 --kv-heads 8 --experts 8 --experts-per-token 2
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from _random_model import Shape, write_model, write_text
from _stages import Stages
from safetensors import safe_open

import lowbit
from lowbit.api.gguf_options import is_gguf_method
from lowbit.api.run import Settings
from lowbit.commands.parse import parse_options
from lowbit.core.hardware import pick_device, reset_peak_memory


@dataclass(frozen=True)
class Row:
    """One run. peak: MiB by place. stages: seconds, of runs in this process."""

    method: str
    gpus: int
    layers: int
    seconds: float
    peak: dict[str, float]
    stages: dict[str, float]
    found: str


def main() -> None:
    arguments = _arguments()
    shape = Shape(**{field.name: getattr(arguments, field.name) for field in fields(Shape)})
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        text = write_text(Path(folder) / "text.txt", arguments.samples * arguments.tokens, shape)
        for number, layers in enumerate(arguments.layers):
            model = Path(folder) / f"model-{layers}"
            write_model(model, layers, shape)
            for method in arguments.method:
                for gpus in arguments.gpus:
                    if number == 0:  # the first run pays for starting CUDA and compiling kernels: not counted
                        _quantize(model, text, arguments, method, gpus, layers, samples=min(16, arguments.samples))
                    row = _quantize(model, text, arguments, method, gpus, layers, samples=arguments.samples)
                    rows.append(row)
                    print(f"{_name(row)}, {layers} layers: {row.seconds:.1f} s{row.found}", file=sys.stderr, flush=True)
            if arguments.trace and number == 0:
                _trace(model, text, arguments, layers)
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
    parser.add_argument("--not-sequential", action="store_true", help="watch all layers of a block at once")
    parser.add_argument(
        "--trace", metavar="FILE", help="write a profile of the first method's first run (for perfetto)"
    )
    parser.add_argument("--dir", help="where checkpoints are written (default: the system's temporary directory)")
    return parser.parse_args()


def _quantize(
    model: Path, text: Path, arguments: argparse.Namespace, chosen: str, gpus: int, layers: int, samples: int
) -> Row:
    """Seconds are from files to files, without starting Python."""
    method, *options = chosen.split(":")
    folder = text.parent / "out"
    folder.mkdir()
    output = folder / ("out.gguf" if is_gguf_method(method) else "out")
    if max(arguments.gpus) > 1:
        record, stages = _by_command(model, output, text, arguments, method, options, gpus, samples), {}
        seconds, peak = record["run"]["seconds"], record["run"]["peak_memory_mib"]
    else:
        reset_peak_memory(pick_device("auto"))
        clock, started = Stages(), time.perf_counter()
        result = lowbit.quantize(
            model,
            output=output,
            method=method,
            dataset=str(text),
            num_samples=samples,
            seq_len=arguments.tokens,
            sequential=False if arguments.not_sequential else None,
            group_size=arguments.group_size,
            options=parse_options(options) or None,
            settings=Settings(verify=False),
            progress=clock,
        )
        seconds, stages = time.perf_counter() - started, clock.finish()
        record, peak = result.record, result.run["peak_memory_mib"]
    found = "".join(f"; {fact}" for fact in [*_unseen_experts(record), *_stored_tensors(folder)])
    shutil.rmtree(folder)
    torch.cuda.empty_cache()
    return Row(chosen, gpus, layers, seconds, peak, stages, found)


def _by_command(
    model: Path,
    output: Path,
    text: Path,
    arguments: argparse.Namespace,
    method: str,
    options: list[str],
    gpus: int,
    samples: int,
) -> dict[str, Any]:
    command = [sys.executable, "-m", "lowbit", "quantize", str(model), "-o", str(output), "--method", method]
    command += ["--dataset", str(text), "--num-samples", str(samples), "--seq-len", str(arguments.tokens)]
    command += ["--gpus", str(gpus), "--no-verify", "--json"]
    command += [] if arguments.group_size is None else ["--group-size", str(arguments.group_size)]
    command += [part for pair in options for part in ("--option", pair)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def _unseen_experts(record: dict[str, Any]) -> list[str]:
    """How many experts were reported to have seen too few tokens; nothing for a model without experts."""
    experts = {path.rpartition(".")[0] for path in record["layers"] if ".experts." in path}
    unseen = {
        path.rpartition(".")[0]
        for path, layer in record["layers"].items()
        if any("fewer tokens" in note for note in layer.get("notes", []))
    }
    return [f"{len(unseen)} of {len(experts)} experts saw too few tokens"] if experts else []


def _stored_tensors(folder: Path) -> list[str]:
    """That no tensor in safetensors files holds NaN, and of how many. Ends the program where one does."""
    count = 0
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                tensor = stored.get_tensor(name)
                count += 1
                if tensor.is_floating_point() and tensor.float().isnan().any():
                    raise SystemExit(f"{name} in {file.name} holds NaN")
    return [f"no NaN in {count} tensors"] if count else []


def _trace(model: Path, text: Path, arguments: argparse.Namespace, layers: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        _quantize(model, text, arguments, arguments.method[0], 1, layers, samples=arguments.samples)
    profiler.export_chrome_trace(arguments.trace)
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=70))


def _name(row: Row) -> str:
    return f"{row.method}, {row.gpus} GPU"


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
            row.method,
            row.gpus,
            row.layers,
            f"{row.seconds:.1f}",
            gpu,
            f"{row.peak['resident'] / 1024:.1f}",
            _seconds(row.stages) or "-",
        ]
        print(f"| {' | '.join(map(str, cells))} |")
    for first in [row for row in rows if row.layers == arguments.layers[0]]:
        last = next(row for row in reversed(rows) if _name(row) == _name(first))
        if last is not first:
            _print_whole(first, last, arguments.whole)


def _print_whole(first: Row, last: Row, layers: int) -> None:
    def reckoned(few: float, many: float) -> tuple[float, float]:
        each = (many - few) / (last.layers - first.layers)
        return each, few + (layers - first.layers) * each

    each, whole = reckoned(first.seconds, last.seconds)
    parts = {what: reckoned(seconds, last.stages[what])[1] for what, seconds in first.stages.items()}
    print(f"{_name(first)}: {each:.2f} s a layer, so {whole:.0f} s for {layers}, files included", end="")
    print(f" ({_seconds(parts)})" if parts else "")


def _seconds(stages: dict[str, float]) -> str:
    return ", ".join(f"{what} {seconds:.1f}" for what, seconds in stages.items())


if __name__ == "__main__":
    main()
