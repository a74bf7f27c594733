"""lowbit serve."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.core.errors import RecipeError

if TYPE_CHECKING:
    from lowbit.api.serve import ServePlan
    from lowbit.runtimes.description import BitsAndBytes

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
    from lowbit.commands.serve_run import detach as detach_server
    from lowbit.commands.serve_run import foreground
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
        detach_server(planned, as_json, patience)
        return
    foreground(planned, patience, background, as_json, quiet)


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

    from lowbit.commands.serve_run import explain

    for line in explain(planned):
        print(line)
    print(f"command    {shlex.join(planned.argv)}")
    print("nothing was started (--dry-run)")
