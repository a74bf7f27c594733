"""Runtimes' own benchmarks: how they are called, and what is taken from their answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lowbit.core.errors import ServeError
from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.client import Client
from lowbit.runtimes.load import Workload
from lowbit.runtimes.own_bench import llama_bench, vllm_bench

ARTIFACT = Artifact("/models/m", "m", "gptq", ("w4a16",))
WORK = Workload(input_len=32, output_len=8, requests=4, seed=7)
FAKE_VLLM = """
import json, os, sys
arguments = sys.argv[1:]
if "broken" in arguments: sys.exit("no such tokenizer")
after = lambda name: arguments[arguments.index(name) + 1]
result = {"arguments": arguments, "mean_ttft_ms": 12.5, "key": os.environ.get("OPENAI_API_KEY", "")}
open(os.path.join(after("--result-dir"), after("--result-filename")), "w").write(json.dumps(
    {**result, "url": after("--base-url"), "prompts": after("--num-prompts"), "at_once": after("--max-concurrency")}))
"""


def fake(folder: Path) -> tuple[str, ...]:
    file = folder / "vllm.py"
    file.write_text(FAKE_VLLM)
    return (sys.executable, str(file))


def test_vllm_bench(tmp_path: Path) -> None:
    client = Client("http://127.0.0.1:8000/v1", "name", "secret")
    found = vllm_bench(fake(tmp_path), client, ARTIFACT, WORK, 2)
    assert found["mean_ttft_ms"] == 12.5
    assert (found["url"], found["prompts"], found["at_once"]) == ("http://127.0.0.1:8000", "4", "2")
    assert found["key"] == "secret"
    assert "arguments" not in found  # lists of every single request are left out
    with pytest.raises(ServeError, match="no such tokenizer"):
        vllm_bench(fake(tmp_path), Client(client.url, "broken"), ARTIFACT, WORK, 2)


def test_llama_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert llama_bench(ARTIFACT, WORK, 2) is None
    program = tmp_path / "llama-bench"
    rows = [{"n_prompt": 32, "avg_ts": 100.0}, {"n_gen": 8, "avg_ts": 20.0}]
    program.write_text(f"#!/bin/sh\n[ \"$2 $4 $6 $8\" = '/models/m 32 8 2' ] && echo '{json.dumps(rows)}'\n")
    program.chmod(0o755)
    assert llama_bench(ARTIFACT, WORK, 2) == rows
