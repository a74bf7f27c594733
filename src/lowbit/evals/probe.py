"""How fast a runtime is and how much memory it takes, measured in a process of its own: python -m lowbit.evals.probe.

Peak resident memory is the whole process's (files that are mapped count as far as they were read). Prefill is the time to
the first token of a prompt of `prompt` tokens; decode the rate of the tokens after it, one sequence.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.core.resident import peak_resident

_REPEATS = 3
RUNTIMES = ("transformers", "llama.cpp")


def probe(
    artifact: str, runtime: str, *, prompt: int, tokens: int, device: str = "cpu", timeout: float = 900.0
) -> dict[str, Any]:
    """Speed and memory of an artifact in `runtime`: prefill_tokens_per_second, decode_tokens_per_second,
    time_to_first_token (s), load_seconds, peak_memory (bytes), peak_gpu_memory, threads. A runtime that cannot load the
    artifact gives {"error": its last words}."""
    command = [sys.executable, "-m", "lowbit.evals.probe", artifact, runtime, str(prompt), str(tokens), device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"runtime": runtime, "error": f"not done after {timeout:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    said = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return {"runtime": runtime, "error": said[-1][:300] if said else f"exit code {done.returncode}"}


def probe_endpoint(url: str, model: str, *, prompt: int, tokens: int, timeout: float = 600.0) -> dict[str, Any]:
    """Speed of a server of OpenAI's completions interface, streamed, one sequence at a time; its memory is its own."""

    def once(size: int, count: int, seed: int) -> tuple[float, float]:
        question = {
            "model": model, "prompt": [(seed * 7919 + i * 104729) % 1000 + 100 for i in range(size)],
            "max_tokens": count, "temperature": 0, "stream": True, "ignore_eos": True,
        }  # fmt: skip
        body = json.dumps(question).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        started, first, last = time.perf_counter(), 0.0, 0.0
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            for line in answer:
                if line.startswith(b"data:") and b"[DONE]" not in line:
                    last = time.perf_counter()
                    first = first or last
        return first - started, last - first

    return _measured(once, prompt, tokens)


def _measured(once: Callable[[int, int, int], tuple[float, float]], prompt: int, tokens: int) -> dict[str, Any]:
    once(8, 2, 0)  # what is done lazily at the first call
    runs = [once(prompt, tokens, seed) for seed in range(1, _REPEATS + 1)]
    first = sorted(run[0] for run in runs)[_REPEATS // 2]
    rest = sorted(run[1] for run in runs)[_REPEATS // 2]
    return {
        "prompt_tokens": prompt,
        "new_tokens": tokens,
        "repeats": _REPEATS,
        "time_to_first_token": first,
        "prefill_tokens_per_second": prompt / first,
        "decode_tokens_per_second": (tokens - 1) / rest if rest > 0 else None,
    }


def _in_transformers(artifact: str, prompt: int, tokens: int, device: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    path = Path(artifact)
    own = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    place = str(path.parent) if own else artifact
    model = AutoModelForCausalLM.from_pretrained(place, dtype="auto", device_map=device, **own)
    load = time.perf_counter() - started

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    def once(size: int, count: int, seed: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = int(model.config.get_text_config().vocab_size)
        ids = torch.randint(0, vocabulary, (1, size), generator=generator).to(model.device)
        wait()
        started = time.perf_counter()
        output = model(ids, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        wait()
        first = time.perf_counter()
        for _ in range(count - 1):
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        wait()
        return first - started, time.perf_counter() - first

    with torch.no_grad():
        found = _measured(once, prompt, tokens)
    found |= {"load_seconds": load, "threads": torch.get_num_threads(), "device": str(model.device)}
    if device.startswith("cuda"):
        found["peak_gpu_memory"] = torch.cuda.max_memory_allocated()
    return found


def _in_llama_cpp(artifact: str, prompt: int, tokens: int) -> dict[str, Any]:
    from lowbit.evals.llama_cpp import embedded_server

    started = time.perf_counter()
    with embedded_server(Path(artifact), prompt + tokens + 8) as address:
        load = time.perf_counter() - started
        found = probe_endpoint(address, "", prompt=prompt, tokens=tokens)
    return found | {"load_seconds": load, "device": "cpu"}


def _main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("artifact", "runtime"):
        parser.add_argument(name)
    for name in ("prompt", "tokens"):
        parser.add_argument(name, type=int)
    parser.add_argument("device")
    asked = parser.parse_args()
    if asked.runtime == "llama.cpp":
        found = _in_llama_cpp(asked.artifact, asked.prompt, asked.tokens)
    else:
        found = _in_transformers(asked.artifact, asked.prompt, asked.tokens, asked.device)
    print(json.dumps({"runtime": asked.runtime, **found, "peak_memory": peak_resident()}))


if __name__ == "__main__":
    _main()
