"""The llama.cpp inside the package xllamacpp as a process of its own, with the flags of `llama-server` that lowbit uses.

    python -m lowbit.runtimes.llama_server --model FILE.gguf --port 8080

The key comes from LLAMA_API_KEY, as llama-server's does. SIGTERM: what is being answered is finished, then it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

DRAIN_SECONDS = 30.0


def main() -> None:
    """Entry point; exits with 1 when the model cannot be loaded."""
    arguments = _parser().parse_args()
    try:
        import xllamacpp
    except ImportError:
        sys.exit("xllamacpp is not installed: pip install 'lowbit[gguf]'")
    stop = threading.Event()
    # before loading: a signal that comes meanwhile must not be lost
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    key = os.environ.get("LLAMA_API_KEY", "")
    try:
        server = xllamacpp.Server(_params(xllamacpp, arguments, key))
    except RuntimeError as error:
        sys.exit(f"llama.cpp could not load {arguments.model}: {error}")
    print(f"llama.cpp listens on {server.listening_address}", file=sys.stderr, flush=True)
    stop.wait()
    _drain(server.listening_address, key)
    # its destructor waits for idle connections; everything it answered has been sent
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--parallel", type=int, default=1, help="sequences at once")
    parser.add_argument("--ctx-size", type=int, default=0, help="tokens of all sequences together; 0: the model's")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--n-gpu-layers", default="auto")
    parser.add_argument("--cache-ram", type=int, default=0, help="MiB of finished prompts kept beside the slots")
    parser.add_argument("--metrics", action="store_true")
    return parser


def _params(xllamacpp: Any, arguments: argparse.Namespace, key: str) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.hostnames, params.port = [arguments.host], arguments.port
    params.n_parallel, params.n_ctx = arguments.parallel, arguments.ctx_size
    params.endpoint_metrics, params.endpoint_slots = arguments.metrics, True
    params.cache_ram_mib, params.ui = arguments.cache_ram, False
    if arguments.alias:
        params.model_alias = {arguments.alias}
    if arguments.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    if arguments.n_gpu_layers != "auto":
        params.n_gpu_layers = int(arguments.n_gpu_layers)
    if key:
        params.api_keys = [key]
    return params


def _drain(address: str, key: str) -> None:
    """Wait until no slot is at work, at most DRAIN_SECONDS."""
    until = time.monotonic() + DRAIN_SECONDS
    request = urllib.request.Request(f"{address}/slots", headers={"Authorization": f"Bearer {key}"} if key else {})
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if not any(slot["is_processing"] for slot in json.load(answer)):
                    break
        except (urllib.error.URLError, TimeoutError, ValueError):
            return
        time.sleep(0.1)
    time.sleep(0.1)  # the last bytes of an answer are on their way when its slot is free


if __name__ == "__main__":
    main()
