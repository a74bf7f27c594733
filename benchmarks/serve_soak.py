"""Does `lowbit serve` last? Hundreds of requests of clients of which some hang up, then kill -9 of the runtime and of lowbit.

    .venv/bin/python benchmarks/serve_soak.py MODEL.gguf [--requests 500] [--clients 16] [--json FILE]
    .venv/bin/python benchmarks/serve_soak.py MODEL --kills-only          # of any runtime

Every client asks, one request after the other, for a short stream; a third hang up at a random piece. Whoever does not
hang up has to get all its tokens and the end of the stream. Memory is the runtime's resident size, after the first tenth
of the requests (caches are filled then) and at the end, when every slot has to be idle again. Rows of the table are
properties; the exit code is 1 when one does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from _table import print_table

from lowbit.core.errors import LowbitError
from lowbit.runtimes.client import Client
from lowbit.runtimes.load import spread

LOWBIT = str(Path(sys.executable).with_name("lowbit"))
TOKENS = 16


def start(model: Path, parallel: int) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    argv = [LOWBIT, "serve", str(model), "--port", "0", "--json", "--quiet", "--parallel", str(parallel), "--context", "256",
            "--name", "soak"]  # fmt: skip
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def runtime_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The process that the guard started, not a helper of its own."""
    [guard] = psutil.Process(process.pid).children()
    return guard.children()[0]


def one(client: Client, number: int, leaves: bool) -> tuple[str, float]:
    """How a request ended ("answered", "left" or an error) and seconds to its first piece."""
    drawn = random.Random(number)
    body = {"prompt": f"{number} people walked into a house and", "max_tokens": TOKENS, "temperature": 0,
            "ignore_eos": True, "stream_options": {"include_usage": True}}  # fmt: skip
    leave_at = drawn.randrange(TOKENS) if leaves else None
    started, first, usage = time.perf_counter(), 0.0, 0
    stream = client.stream("/completions", body)
    try:
        for index, chunk in enumerate(stream):
            first = first or time.perf_counter() - started
            usage = int((chunk.get("usage") or {}).get("completion_tokens", usage))
            if index == leave_at:
                stream.close()
                return "left", first
    except LowbitError as error:
        return error.message, first
    return ("answered" if usage == TOKENS else f"answered with {usage} tokens"), first


def soak(model: Path, requests: int, clients: int, parallel: int) -> list[dict[str, Any]]:
    process, told = start(model, parallel)
    client = Client(told["url"], told["model"], timeout=300)
    runtime = runtime_of(process)
    drawn = random.Random(0)
    leaves = [drawn.random() < 1 / 3 for _ in range(requests)]
    early: list[int] = []
    lock, done = threading.Lock(), [0]

    def ask(number: int) -> tuple[str, float]:
        ended = one(client, number, leaves[number])
        with lock:
            done[0] += 1
            if done[0] == requests // 10:
                early.append(runtime.memory_info().rss)
        return ended

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(ask, range(requests)))
    seconds = time.perf_counter() - started
    idle = until(lambda: not any(slot["is_processing"] for slot in get(told["url"].removesuffix("/v1") + "/slots")))
    late, descriptors = runtime.memory_info().rss, runtime.num_fds()
    ends = [end for end, _ in results]
    lost = [end for end in ends if end not in ("answered", "left")]
    growth = (late - early[0]) / 2**20
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    return [
        row(
            "answered in full",
            f"{ends.count('answered')} of {leaves.count(False)}, {ends.count('left')} hung up",
            not lost,
        ),
        row("lost or in error", f"{len(lost)} {lost[:2] if lost else ''}", not lost),
        row("took", f"{seconds:.0f} s, {clients} clients on {parallel} slots", True),
        row("first piece, p50 and p99", "{p50:.2f} s and {p99:.2f} s".format(**spread([t for _, t in results])), True),
        row("memory after a tenth, at the end", f"{early[0] / 2**20:.0f} and {late / 2**20:.0f} MiB", growth < 32),
        row(
            "slots idle at the end, open files",
            f"{'all' if idle else 'not all'}, {descriptors}",
            idle and descriptors < 64,
        ),
        row("exit code after SIGTERM", str(code), code == 0),
    ]


def killed(model: Path) -> list[dict[str, Any]]:
    process, _ = start(model, 2)
    os.kill(runtime_of(process).pid, signal.SIGKILL)
    at = time.perf_counter()
    code = process.wait(60)
    seconds = time.perf_counter() - at
    assert process.stderr is not None
    said = next((line for line in process.stderr if line.startswith("error: ")), "").strip()
    rows = [row("kill -9 of the runtime is reported", f"after {seconds:.2f} s: {said}", seconds < 2 and code == 1)]
    process, _ = start(model, 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    at = time.perf_counter()
    process.wait()
    left = psutil.wait_procs(children, timeout=15)[1]
    rows.append(row("kill -9 of lowbit", f"{len(left)} of {len(children)} processes left after "
                    f"{time.perf_counter() - at:.2f} s", not left))  # fmt: skip
    return rows


def row(what: str, seen: str, holds: bool) -> dict[str, Any]:
    return {"property": what, "seen": seen, "holds": "yes" if holds else "NO"}


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def until(done: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(done())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .gguf file; with --kills-only anything that can be served")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--parallel", type=int, default=4, help="slots of the server")
    parser.add_argument("--kills-only", action="store_true", help="only kill -9, of the runtime and of lowbit")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [] if args.kills_only else soak(args.model, args.requests, args.clients, args.parallel)
    rows += killed(args.model)
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if any(row["holds"] != "yes" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
