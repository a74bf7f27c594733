"""lowbit serve."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.core.errors import RecipeError, ServeError

if TYPE_CHECKING:
    from lowbit.api.serve import ServePlan
    from lowbit.runtimes.description import BitsAndBytes
    from lowbit.runtimes.state import ServerRecord

Key = Annotated[
    str | None,
    typer.Option(metavar="KEY", envvar="LOWBIT_API_KEY", help="What clients have to show. Better by the variable."),
]
Patience = Annotated[float, typer.Option(help="Seconds to wait for the first completion.")]
Runtime = Annotated[
    str | None, typer.Option(help="llama.cpp, vllm, transformers or tensorrt-llm.", show_default="what suits best")
]
Program = Annotated[
    Path | None,
    typer.Option(
        "--python", "--program", metavar="PATH", help="Python of an environment with the runtime, or its program."
    ),
]


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Artifact, checkpoint directory, .gguf or hub id.")],
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]", help="Handed to the runtime as they are.")
    ] = None,
    runtime: Runtime = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="the artifact's")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=16, help="Tokens of one sequence.", show_default="the model's, at most 4096")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 4,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="the cores there are")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    gpu_layers: Annotated[str, typer.Option(help="llama.cpp: layers on the GPU.")] = "auto",
    gpu_memory: Annotated[float, typer.Option(min=0.05, max=1, help="Share of each GPU that may be taken.")] = 0.9,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="GPUs.", show_default="as few as it fits on")
    ] = None,
    cache_gib: Annotated[
        int | None, typer.Option(min=1, help="KV cache of vLLM on a CPU, in GiB.", show_default="what is needed")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of unquantized tensors.", show_default="the artifact's")] = None,
    load_in: Annotated[
        str | None, typer.Option(metavar="8bit|nf4|fp4", help="Quantize while loading (bitsandbytes).")
    ] = None,
    compute_dtype: Annotated[str, typer.Option(help="With --load-in nf4 or fp4.")] = "bfloat16",
    double_quant: Annotated[bool, typer.Option("--double-quant", help="With nf4 or fp4: scales in 8 bits.")] = False,
    python: Program = None,
    api_key: Key = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No key, whoever can reach the address.")] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="In the background: lowbit ps, logs, stop.")] = False,
    patience: Patience = 600.0,
    drain: Annotated[int, typer.Option(min=0, help="Seconds to finish running requests when stopped.")] = 30,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare checksums.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be started.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The ready line as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Not the runtime's own output.")] = False,
    background: Annotated[str | None, typer.Option(hidden=True, help="Name and log of a detached server.")] = None,
) -> None:
    """Serve an artifact with the runtime that suits it and this machine best, behind an OpenAI-compatible endpoint.

    LOAD_IN_8BIT=true, or LOAD_IN_4BIT=true with BNB_4BIT_QUANT_TYPE, BNB_4BIT_COMPUTE_DTYPE and
    BNB_4BIT_USE_DOUBLE_QUANT, quantize an unquantized model while it is loaded, as --load-in does.

    Examples:

    lowbit serve model-Q4_K_M.gguf

    lowbit serve llama-w4 --port 0 --detach

    LOWBIT_API_KEY=... lowbit serve llama-w4 --runtime vllm --host 0.0.0.0 -- --enable-prefix-caching
    """
    from lowbit.api.serve import plan
    from lowbit.runtimes.description import ServeOptions

    options = ServeOptions(
        host=host,
        port=port,
        name=name,
        context=context,
        parallel=parallel,
        threads=threads,
        gpu_layers=gpu_layers,
        gpu_memory=gpu_memory,
        tensor_parallel=tensor_parallel or 0,
        cache_gib=cache_gib or 0,
        dtype=dtype,
        bitsandbytes=_bitsandbytes(load_in, compute_dtype, double_quant),
        drain=drain,
        extra=tuple(extra or ()),
    )
    planned = plan(
        model,
        runtime=runtime,
        options=options,
        device=device,
        program=python,
        key=api_key,
        insecure=insecure,
        verify=not no_verify,
    )
    if dry_run:
        _print_plan(planned, as_json)
        return
    if detach:
        _detach(planned, as_json, patience)
        return
    _foreground(planned, patience, background, as_json, quiet)


def _bitsandbytes(load_in: str | None, compute_dtype: str, double_quant: bool) -> BitsAndBytes | None:
    from lowbit.runtimes.bnb_variables import from_variables

    if load_in is None:
        return from_variables(os.environ)
    bits = {"8bit": "LOAD_IN_8BIT", "nf4": "LOAD_IN_4BIT", "fp4": "LOAD_IN_4BIT"}.get(load_in)
    if bits is None:
        raise RecipeError(f"--load-in {load_in!r} is unknown", hint="8bit, nf4 or fp4")
    details = {"BNB_4BIT_QUANT_TYPE": load_in, "BNB_4BIT_COMPUTE_DTYPE": compute_dtype}
    if double_quant:
        details["BNB_4BIT_USE_DOUBLE_QUANT"] = "true"
    return from_variables({bits: "true", **(details if load_in != "8bit" else {})})


def _print_plan(planned: ServePlan, as_json: bool) -> None:
    memory = planned.memory
    if as_json:
        print(json.dumps({"runtime": planned.choice.runtime.name, "device": planned.choice.device,
                          "why": planned.choice.why, "not_chosen": planned.choice.passed, "command": planned.argv,
                          "url": planned.url, "model": planned.model,
                          "memory": None if memory is None else memory.to_dict(),
                          "memory_budget": planned.budget}, indent=2))  # fmt: skip
        return
    import shlex

    for line in _explain(planned):
        print(line)
    print(f"command    {shlex.join(planned.argv)}")
    print("nothing was started (--dry-run)")


def _explain(planned: ServePlan) -> list[str]:
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


def _foreground(planned: ServePlan, patience: float, background: str | None, as_json: bool, quiet: bool) -> None:
    import psutil

    from lowbit.api.serve import start
    from lowbit.runtimes import state

    for line in _explain(planned):
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


def _detach(planned: ServePlan, as_json: bool, patience: float) -> None:
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
