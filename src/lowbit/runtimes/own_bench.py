"""Benchmarks that runtimes bring themselves: `vllm bench serve` against a running server, and `llama-bench`."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from lowbit.core.errors import ServeError
from lowbit.environments import child_variables
from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.client import Client
from lowbit.runtimes.diagnose import quote
from lowbit.runtimes.load import Workload


def vllm_bench(
    program: tuple[str, ...], client: Client, artifact: Artifact, workload: Workload, concurrency: int
) -> dict[str, Any]:
    """The result file of `vllm bench serve` on random tokens; times in milliseconds. Raises ServeError."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [*program, "bench", "serve", "--base-url", client.url.removesuffix("/v1"), "--endpoint", "/v1/completions",
                "--model", client.model, "--tokenizer", artifact.location, "--dataset-name", "random",
                "--random-input-len", str(workload.input_len), "--random-output-len", str(workload.output_len),
                "--num-prompts", str(workload.requests), "--max-concurrency", str(concurrency), "--seed",
                str(workload.seed), "--ignore-eos", "--percentile-metrics", "ttft,tpot,itl,e2el",
                "--metric-percentiles", "50,95,99", "--save-result", "--result-dir", folder,
                "--result-filename", "result.json", "--disable-tqdm"]  # fmt: skip
        variables = {"HF_HUB_OFFLINE": "1", **({"OPENAI_API_KEY": client.key} if client.key else {})}
        _run(argv, variables, "vllm bench serve")
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    return {name: value for name, value in result.items() if isinstance(value, (int, float, str))}


def llama_bench(artifact: Artifact, workload: Workload, threads: int) -> list[dict[str, Any]] | None:
    """What llama-bench says of prompt and generation speed, tokens a second; None where it is not installed."""
    program = shutil.which("llama-bench")
    if program is None:
        return None
    argv = [program, "-m", artifact.location, "-p", str(workload.input_len), "-n", str(workload.output_len), "-t",
            str(threads), "-o", "json"]  # fmt: skip
    rows: list[dict[str, Any]] = json.loads(_run(argv, {}, "llama-bench"))
    return rows


def _run(argv: list[str], variables: dict[str, str], what: str) -> str:
    done = subprocess.run(
        argv, env=child_variables(variables), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        raise ServeError(f"{what} failed with exit code {done.returncode}{quote(done.stderr.splitlines())}")
    return done.stdout
