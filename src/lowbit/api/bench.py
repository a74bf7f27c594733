"""Speed, memory and energy of artifacts, each served by a runtime and asked by one and the same client."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowbit import __version__
from lowbit.api.runs import read_run, run_file, write_run
from lowbit.api.serve import ServePlan, plan, serving
from lowbit.core.errors import ServeError
from lowbit.core.progress import Progress, Silent
from lowbit.recommend.detect import detect
from lowbit.recommend.records import BenchRecord, append_record
from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.client import Client
from lowbit.runtimes.description import ServeOptions
from lowbit.runtimes.energy import EnergyMeter
from lowbit.runtimes.load import LoadResult, PeakSampler, Workload, measure
from lowbit.runtimes.machine import nvidia_gpus
from lowbit.runtimes.own_bench import llama_bench, vllm_bench

MARGIN = 32  # tokens of context beyond prompt and answer: prompts are only nearly as long as asked


@dataclass(frozen=True)
class BenchRow:
    """An artifact at one concurrency. memory_mib: peak resident memory of the runtime, gpu_memory_mib: of all GPUs together
    (what others use there included). joules_per_token: of the whole machine, over output tokens; None where it cannot be
    read. own: what the runtime's own benchmark says, None when it was not run."""

    artifact: str
    runtime: str
    scheme: str
    ready_seconds: float | None
    memory_mib: float | None
    gpu_memory_mib: float | None
    joules_per_token: float | None
    load: LoadResult
    own: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bench(
    model: str | Path,
    *,
    workload: Workload | None = None,
    concurrencies: Sequence[int] = (1, 4),
    runtime: str | None = None,
    options: ServeOptions | None = None,
    device: str = "auto",
    program: Path | None = None,
    patience: float = 600.0,
    own: bool = False,
    record: bool = True,
    progress: Progress | None = None,
) -> list[BenchRow]:
    """Serve `model` and measure it at each concurrency, streaming, at temperature 0.

    options: of the server; its context and slots are set to what the workload needs. own: also run `vllm bench serve`
    against the same server, or llama-bench on the file, where they are installed. record: append what was measured to the
    local file that predictions are corrected by, and put one client's speed into the artifact's run for the report.
    Raises LowbitError subclasses as `serve` does, and ServeError when no request is answered.
    """
    work = workload or Workload()
    listener = progress or Silent()
    asked = replace(
        options or ServeOptions(),
        port=0,
        context=work.input_len + work.output_len + MARGIN,
        parallel=max(concurrencies),
    )
    planned = plan(model, runtime=runtime, options=asked, device=device, program=program)
    rows = []
    with serving(planned, patience=patience) as server:
        for concurrency in concurrencies:
            listener.start(f"{planned.model} x{concurrency}", work.requests)
            meter = EnergyMeter()
            with PeakSampler(server.resident) as memory, PeakSampler(_gpu_memory, 1.0) as gpu:
                load = measure(planned.client, work, concurrency, ignore_eos(planned, work), listener.advance)
            joules = meter.joules()
            rows.append(
                BenchRow(
                    artifact=str(model),
                    runtime=planned.choice.runtime.name,
                    scheme=planned.artifact.scheme,
                    ready_seconds=server.ready_seconds,
                    memory_mib=memory.peak / 2**20,
                    gpu_memory_mib=gpu.peak / 2**20 if gpu.peak else None,
                    joules_per_token=None if joules is None else joules / load.output_tokens,
                    load=load,
                    own=_own(planned, work, concurrency) if own else None,
                )
            )
    if record:
        _remember(planned, rows, work)
        _into_run(Path(model), rows)
    return rows


def bench_url(
    client: Client, workload: Workload, concurrencies: Sequence[int], progress: Progress | None = None
) -> list[BenchRow]:
    """The same client against a server that runs already; nothing is known of its memory."""
    listener = progress or Silent()
    served = client if client.model else replace(client, model=_only_model(client))
    rows = []
    for concurrency in concurrencies:
        listener.start(f"{served.model} x{concurrency}", workload.requests)
        load = measure(served, workload, concurrency, {}, listener.advance)
        rows.append(BenchRow(served.url, "", "", None, None, None, None, load))
    return rows


def ignore_eos(planned: ServePlan, workload: Workload) -> dict[str, Any]:
    """Request options with which an answer has all its tokens, and the server counts them, in the runtime's words."""
    if planned.choice.runtime.name == "transformers":
        import json

        length = {"max_new_tokens": workload.output_len, "min_new_tokens": workload.output_len, "do_sample": False}
        return {"generation_config": json.dumps(length)}
    return {"ignore_eos": True, "stream_options": {"include_usage": True}}


def _own(planned: ServePlan, workload: Workload, concurrency: int) -> Any:
    if planned.choice.runtime.name == "vllm":
        return vllm_bench(planned.choice.program, planned.client, planned.artifact, workload, concurrency)
    if planned.choice.runtime.name == "llama.cpp":
        return llama_bench(planned.artifact, workload, planned.options.threads or 1)
    return None


def _only_model(client: Client) -> str:
    names = client.models()
    if len(names) != 1:
        raise ServeError(f"{client.url} serves {len(names)} models", hint=f"--model, one of: {', '.join(names[:10])}")
    return names[0]


def _gpu_memory() -> int:
    return sum(gpu.memory - gpu.free for gpu in nvidia_gpus())


def _remember(planned: ServePlan, rows: list[BenchRow], workload: Workload) -> None:
    hardware = detect().id
    for row in rows:
        load = row.load
        append_record(
            BenchRecord(
                model_id=_base(planned.artifact),
                artifact_bytes=planned.artifact.weight_bytes,
                scheme=_preset(planned.artifact),
                runtime=row.runtime,
                hardware=hardware,
                decode_tokens_per_s=1 / load.tpot["mean"] if load.tpot else 0.0,
                prefill_tokens_per_s=load.concurrency * load.prompt_tokens / load.requests / load.ttft["mean"],
                context=workload.input_len + workload.output_len,
                concurrency=load.concurrency,
                date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                lowbit=__version__,
            )
        )


def _into_run(model: Path, rows: list[BenchRow]) -> None:
    """The speed of one client becomes part of the artifact's run, which `compare` and `report` show; where there is one."""
    alone = next((row for row in rows if row.load.concurrency == 1), None)
    file = run_file(model)
    if alone is None or not file.is_file():
        return
    load, run = alone.load, read_run(file)
    run["speed"] = {
        "prefill_tokens_per_second": load.prompt_tokens / load.requests / load.ttft["mean"],
        "decode_tokens_per_second": 1 / load.tpot["mean"] if load.tpot else 0.0,
        "time_to_first_token": load.ttft["mean"],
        "peak_memory": round((alone.gpu_memory_mib or alone.memory_mib or 0.0) * 2**20),
        "runtime": alone.runtime,
        "prompt_tokens": round(load.prompt_tokens / load.requests),
    }
    write_run(run, file)


def _base(artifact: Artifact) -> str:
    base = (artifact.record or {}).get("base") or {}
    return str(base.get("name") or artifact.name)


def _preset(artifact: Artifact) -> str:
    recipe = (artifact.record or {}).get("recipe") or {}
    return str(recipe.get("method") or artifact.labels[0]).lower()
