"""Runs a planned server: in the foreground until it is stopped or ends, or once more in the background."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from lowbit.core.errors import ServeError

if TYPE_CHECKING:
    from lowbit.api.serve import ServePlan
    from lowbit.runtimes.state import ServerRecord


def explain(planned: ServePlan) -> list[str]:
    """Lines that say what is started and why."""
    lines = [f"runtime    {planned.choice.runtime.title}: {planned.choice.why}"]
    lines += [f"not        {name}: {reason}" for name, reason in planned.choice.passed.items()]
    if planned.memory is not None:
        parts = planned.memory
        lines.append(
            f"memory     about {parts.total / 2**30:.2f} of {planned.budget / 2**30:.2f} GiB at {planned.options.parallel} x "
            f"{planned.options.context} tokens (weights {parts.weights / 2**30:.2f}, cache {parts.cache / 2**30:.2f})"
        )
    return lines


class _Stopped(BaseException):
    """SIGTERM or Ctrl-C: unwinds to where the server is stopped."""


def foreground(planned: ServePlan, patience: float, background: str | None, as_json: bool, quiet: bool) -> None:
    """Start, print the ready line, and watch. background: the name under which it is listed, None in a terminal.

    Raises ServeError when the runtime does not get ready or ends by itself.
    """
    import psutil

    from lowbit.api.serve import start
    from lowbit.runtimes import state

    for line in explain(planned):
        print(line, file=sys.stderr, flush=True)
    record = state.ServerRecord(
        name=background or state.free_name(planned.model),
        pid=os.getpid(),
        created=psutil.Process().create_time(),
        artifact=planned.artifact.location,
        runtime=planned.choice.runtime.name,
        url=planned.url,
        model=planned.model,
        status="starting",
        log=str(state.default_root() / f"{background}.log") if background else None,
    )
    state.write(record)
    failed = False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    server = start(planned, (lambda line: None) if quiet else _show(planned.choice.runtime.name))
    try:
        seconds = server.wait_ready(patience)
        record = state.update(record, "ready")
        _print_ready(planned, record, seconds, as_json)
        server.wait()
        raise server.crash("while it was serving")
    except _Stopped:
        print("stopping: finishing what is being answered", file=sys.stderr, flush=True)
    except ServeError:
        failed = True
        raise
    finally:
        server.stop(planned.options.drain)
        if failed and background:
            state.update(record, "failed")
        else:
            state.forget(record.name)


def _stop(number: int, frame: Any) -> None:
    # once only: stopping itself must not be interrupted
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise _Stopped


def _show(name: str) -> Any:
    def show(line: str) -> None:
        print(f"{name} | {line}", file=sys.stderr, flush=True)

    return show


def _print_ready(planned: ServePlan, record: ServerRecord, seconds: float, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"url": planned.url, "model": planned.model, "runtime": record.runtime, "name": record.name,
                          "pid": record.pid, "seconds": round(seconds, 2)}), flush=True)  # fmt: skip
        return
    print(f"ready in {seconds:.1f} s: {planned.url}  model {planned.model}", flush=True)
    header = " -H 'Authorization: Bearer KEY'" if planned.key else ""
    body = json.dumps({"model": planned.model, "messages": [{"role": "user", "content": "Why is the sky blue?"}]})
    print(f"curl {planned.url}/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'", flush=True)


def detach(planned: ServePlan, as_json: bool, patience: float) -> None:
    """The same command once more, in the background; returns when it is ready, raises ServeError when it is not."""
    import subprocess

    from lowbit.runtimes import state

    name = state.free_name(planned.model)
    log = state.open_log(name)
    state.forget(name)
    argv = [sys.executable, "-m", "lowbit.cli", *_without(sys.argv[1:]), "--background", name]
    variables = {**os.environ, **({"LOWBIT_API_KEY": planned.key} if planned.key else {})}
    with log.open("w") as out:
        process = subprocess.Popen(
            argv, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    until = time.monotonic() + patience + 60
    while process.poll() is None and time.monotonic() < until:
        record = next((known for known in state.servers() if known.name == name), None)
        if record is not None and record.status == "ready":
            if as_json:
                print(json.dumps({"url": record.url, "model": record.model, "runtime": record.runtime, "name": name,
                                  "pid": record.pid}))  # fmt: skip
            else:
                print(f"{name}: {record.url}  model {record.model}")
                print(f"lowbit logs {name}; lowbit chat {record.url}; lowbit stop {name}")
            return
        time.sleep(0.1)
    process.terminate()
    lines = log.read_text(errors="replace").splitlines()
    error = next((line for line in reversed(lines) if line.startswith("error: ")), "error: it did not get ready")
    raise ServeError(error.removeprefix("error: "), hint=f"the whole log: {log}")


def _without(arguments: list[str]) -> list[str]:
    """The command line without what must not be repeated: --detach and the key."""
    kept, skip = [], False
    before, separator, after = arguments, [], []
    if "--" in arguments:
        at = arguments.index("--")
        before, separator, after = arguments[:at], ["--"], arguments[at + 1 :]
    for word in before:
        if skip:
            skip = False
        elif word == "--api-key":
            skip = True
        elif word not in ("--detach", "-d", "--json") and not word.startswith("--api-key="):
            kept.append(word)
    return [*kept, *separator, *after]
