"""What every peer script shares: the options, the token windows, the JSON line at the end.

These scripts run inside a side environment and import nothing of lowbit.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def options(description: str) -> argparse.ArgumentParser:
    """The options that every quantizer has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="a Hugging Face directory")
    parser.add_argument("output", help="the directory to write")
    parser.add_argument("--tokens", help=".npy or .json with token windows [samples, seq-len]; instead of --text")
    parser.add_argument("--text", help="a text file, cut into windows from its start")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows (default 128)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a window (default 1024)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64, help="0: one scale per output channel")
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; llm-compressor takes a GPU wherever there is one")
    parser.add_argument(
        "--dtype", default="auto", help="what is computed in; the result is saved as the model is stored"
    )
    return parser


def windows(args: argparse.Namespace) -> list[list[int]]:
    """The calibration windows as token ids [samples, seq-len]."""
    if args.tokens:
        path = Path(args.tokens)
        if path.suffix == ".json":
            rows = json.loads(path.read_text())
        else:
            import numpy

            rows = numpy.load(path, allow_pickle=False).tolist()
        return [row[: args.seq_len] for row in rows[: args.num_samples]]
    if not args.text:
        raise SystemExit("give --tokens or --text")
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(args.model)(Path(args.text).read_text()).input_ids
    if len(ids) < args.num_samples * args.seq_len:
        raise SystemExit(f"{args.text} has {len(ids)} tokens, fewer than {args.num_samples} x {args.seq_len}")
    return [ids[i * args.seq_len : (i + 1) * args.seq_len] for i in range(args.num_samples)]


class Measured:
    """`with Measured(...)`: prints {seconds, peak_rss_mib, versions} as the last line of stdout when the block is done, where
    there is a GPU with peak_gpu_mib.

    Imports before the block do not count as time, starting CUDA does; imports do count as memory, as they do for anyone who
    runs the tool.
    """

    def __init__(self, *packages: str) -> None:
        self.versions = {name: version(name) for name in ("torch", "transformers", *packages)}

    def __enter__(self) -> None:
        import torch

        self.start = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            import torch

            seconds = round(time.perf_counter() - self.start, 1)
            # not ru_maxrss, which starts at what the parent held when it started this process
            status = Path("/proc/self/status").read_text()
            cost = {"seconds": seconds, "peak_rss_mib": int(status.split("VmHWM:")[1].split()[0]) // 1024}
            if torch.cuda.is_available():
                cost["peak_gpu_mib"] = torch.cuda.max_memory_allocated() // 2**20
            print(json.dumps({**cost, "versions": self.versions}), flush=True)
