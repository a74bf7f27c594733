"""lowbit bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.core.errors import RecipeError

if TYPE_CHECKING:
    from lowbit.api.bench import BenchRow

HEADINGS = ("artifact", "runtime", "clients", "tokens/s", "requests/s", "first token p50/p95/p99 ms",
            "between tokens p50/p95/p99 ms", "peak MiB", "J/token")  # fmt: skip


def bench(
    artifacts: Annotated[
        list[str],
        typer.Argument(metavar="ARTIFACT...", help="Artifacts, .gguf files, hub ids, or http://HOST:PORT/v1."),
    ],
    runtime: Annotated[str | None, typer.Option(help="One runtime for all.", show_default="what suits best")] = None,
    concurrency: Annotated[str, typer.Option(help="Clients at once, one row each: 1,4,16.")] = "1,4",
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, nearly.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests at each concurrency.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="the cores there are")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    python: Annotated[
        Path | None, typer.Option("--python", "--program", metavar="PATH", help="As in lowbit serve.")
    ] = None,
    own: Annotated[
        bool, typer.Option("--own", help="Also the runtime's own: vllm bench serve, llama-bench where installed.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="For an http:// address that serves several models.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="LOWBIT_API_KEY", help="For an http:// address.")] = None,
    patience: Annotated[float, typer.Option(help="Seconds to wait for the first completion.")] = 600.0,
    no_record: Annotated[bool, typer.Option("--no-record", help="Do not keep it for lowbit recommend.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table in Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure how fast artifacts are served: time to first token, time between tokens, throughput, memory, energy.

    One client for all runtimes, streaming; prompts of random words, answers of exactly --output-len tokens at
    temperature 0. Artifacts are served one after the other.

    Example: lowbit bench model-Q4_K_M.gguf model-Q8_0.gguf --concurrency 1,4,16
    """
    from lowbit.api.bench import bench as run
    from lowbit.api.bench import bench_url
    from lowbit.commands.progress import listener
    from lowbit.runtimes.client import Client
    from lowbit.runtimes.description import ServeOptions
    from lowbit.runtimes.load import Workload

    workload = Workload(input_len, output_len, num_requests, seed)
    clients = _concurrencies(concurrency)
    rows: list[BenchRow] = []
    with listener(quiet=quiet or as_json) as progress:
        for artifact in artifacts:
            if artifact.startswith(("http://", "https://")):
                rows += bench_url(Client(artifact.rstrip("/"), model or "", api_key), workload, clients, progress)
                continue
            rows += run(
                artifact,
                workload=workload,
                concurrencies=clients,
                runtime=runtime,
                options=ServeOptions(threads=threads, tensor_parallel=0),
                device=device,
                program=python,
                patience=patience,
                own=own,
                record=not no_record,
                progress=progress,
            )
    if as_json:
        print(json.dumps([row.to_dict() for row in rows], indent=2))
        return
    _print([_cells(row) for row in rows], markdown)
    for row in rows:
        for error in row.load.errors:
            typer.echo(f"warning: {row.load.failed} requests of {row.artifact} failed: {error}", err=True)
        if row.own:
            print(f"own benchmark of {row.runtime}, {row.artifact} x{row.load.concurrency}: {json.dumps(row.own)}")


def _concurrencies(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise RecipeError(f"--concurrency {text!r} is not a list of numbers", hint="such as 1,4,16")
    return [int(part) for part in parts]


def _cells(row: BenchRow) -> list[str]:
    load = row.load
    memory = row.gpu_memory_mib or row.memory_mib
    return [
        Path(row.artifact).name if "://" not in row.artifact else row.artifact,
        row.runtime,
        str(load.concurrency),
        f"{load.output_tokens_per_s:.1f}",
        f"{load.requests_per_s:.2f}",
        _milliseconds(load.ttft),
        _milliseconds(load.itl),
        f"{memory:,.0f}" if memory else "",
        f"{row.joules_per_token:.2f}" if row.joules_per_token is not None else "",
    ]


def _milliseconds(spread: dict[str, float]) -> str:
    return " / ".join(f"{1000 * spread[mark]:.0f}" for mark in ("p50", "p95", "p99")) if spread else ""


def _print(rows: list[list[Any]], markdown: bool) -> None:
    if markdown:
        print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADINGS, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
