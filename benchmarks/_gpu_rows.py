"""One run of gpu_7b.py, measured: ours in this process or by command, or llm-compressor's in its side environment."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _stages import Stages
from safetensors import safe_open

import lowbit
from lowbit.api.gguf_options import is_gguf_method
from lowbit.api.quantize import recipe_for
from lowbit.api.run import Settings
from lowbit.commands.parse import parse_options
from lowbit.core.errors import SideEnvironmentError
from lowbit.core.hardware import pick_device, reset_peak_memory
from lowbit.environments import python_of, run_json

PEER = "llm-compressor"
_SCRIPTS = Path(__file__).parent / "_peers"
# method -> the peer's script and what it takes besides bits, group size and symmetry
_PEER_SCRIPTS = {
    "gptq": ("llmcompressor_gptq.py", "--actorder", "static"),
    # 16 bits, as ours computes in on a GPU; not float16, in which the sums of squares that its search compares overflow
    "awq": ("llmcompressor_awq.py", "--dtype", "bfloat16"),
    "fp8": ("llmcompressor_scheme.py", "--scheme", "FP8_DYNAMIC"),
    "int8": ("llmcompressor_rtn.py",),
    "rtn": ("llmcompressor_rtn.py",),
}


@dataclass(frozen=True)
class Source:
    """A checkpoint of so many layers, and text to calibrate with."""

    model: Path
    layers: int
    text: Path


@dataclass(frozen=True)
class Row:
    """One run. peak: MiB by place. stages: seconds, of runs in this process. peer: made by PEER, not by lowbit.
    errors: relative ones by layer, where the method knows them."""

    method: str
    gpus: int
    layers: int
    seconds: float
    peak: dict[str, float]
    stages: dict[str, float]
    found: str = ""
    peer: bool = False
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def quantizer(self) -> str:
        return f"{PEER} {self.method}" if self.peer else self.method

    @property
    def name(self) -> str:
        return f"{self.quantizer}, {self.gpus} GPU"


def ours(source: Source, arguments: argparse.Namespace, chosen: str, gpus: int, samples: int) -> Row:
    """METHOD[:OPTION=VALUE...] by lowbit. Seconds are from files to files, without starting Python."""
    method, *options = chosen.split(":")
    with TemporaryDirectory(dir=source.text.parent) as folder:
        output = Path(folder) / ("out.gguf" if is_gguf_method(method) else "out")
        if max(arguments.gpus) > 1:
            record, stages = _by_command(source, output, arguments, method, options, gpus, samples), {}
            seconds, peak = record["run"]["seconds"], record["run"]["peak_memory_mib"]
        else:
            reset_peak_memory(pick_device("auto"))
            clock, started = Stages(), time.perf_counter()
            result = lowbit.quantize(
                source.model,
                output=output,
                method=method,
                dataset=str(source.text),
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
        found = "".join(f"; {fact}" for fact in [*_unseen_experts(record), *_stored_tensors(Path(folder))])
    torch.cuda.empty_cache()
    errors = {path: layer["error"] for path, layer in record["layers"].items() if layer.get("error")}
    return Row(chosen, gpus, source.layers, seconds, peak, stages, found, errors=errors)


def _by_command(
    source: Source,
    output: Path,
    arguments: argparse.Namespace,
    method: str,
    options: list[str],
    gpus: int,
    samples: int,
) -> dict[str, Any]:
    command = [sys.executable, "-m", "lowbit", "quantize", str(source.model), "-o", str(output), "--method", method]
    command += ["--dataset", str(source.text), "--num-samples", str(samples), "--seq-len", str(arguments.tokens)]
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


def methods_with_peer(arguments: argparse.Namespace) -> list[str]:
    """Those of the methods that the peer will run too; says on stderr where it would and is not installed."""
    methods = [method for method in arguments.method if method in _PEER_SCRIPTS]
    if not methods or not arguments.peers or arguments.experts or 1 not in arguments.gpus:
        return []
    try:
        python_of(PEER)
    except SideEnvironmentError as error:
        print(f"{error.message} Without its rows, then; to have them: {error.hint}", file=sys.stderr, flush=True)
        return []
    return methods


def peer(source: Source, arguments: argparse.Namespace, method: str) -> Row | None:
    """The same by the peer, on 1 GPU; None where it fails, which is said on stderr."""
    recipe = recipe_for(method).updated(group_size=arguments.group_size)
    script, *own = _PEER_SCRIPTS[method]
    with TemporaryDirectory(dir=source.text.parent) as folder:
        argv = [str(_SCRIPTS / script), str(source.model), str(Path(folder) / "out"), "--text", str(source.text)]
        argv += ["--num-samples", str(arguments.samples), "--seq-len", str(arguments.tokens)]
        argv += ["--bits", str(recipe.bits), "--group-size", str(recipe.group_size)]
        argv += ["--sym" if recipe.symmetric else "--no-sym", "--threads", str(os.cpu_count())]
        try:
            cost = run_json(PEER, [*argv, *own])
        except SideEnvironmentError as error:
            print(f"{PEER} {method}, {source.layers} layers: {error.message}", file=sys.stderr, flush=True)
            return None
    peak = {"resident": cost["peak_rss_mib"]} | ({"gpu": cost["peak_gpu_mib"]} if "peak_gpu_mib" in cost else {})
    return Row(method, 1, source.layers, cost["seconds"], peak, {}, peer=True)
