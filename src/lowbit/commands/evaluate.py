"""lowbit evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.core.errors import RecipeError


def evaluate(
    artifact: Annotated[
        str,
        typer.Argument(metavar="ARTIFACT", help="Artifact, checkpoint directory, .gguf, hub id, or a server's URL."),
    ],
    base: Annotated[str | None, typer.Option(help="Compare with this model; by default the recorded one.")] = None,
    tasks: Annotated[
        str, typer.Option(help="kl, perplexity, and tasks of lm-eval: mmlu,hellaswag,arc_challenge,gsm8k,wikitext ...")
    ] = "kl",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first items of each task; mmlu:5 sets one task's own.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question, not the task's default.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Task data as TASK.SPLIT.jsonl, instead of the hub.")
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="What tasks run on: transformers, llama.cpp, vllm, or a server's URL.")
    ] = "transformers",
    dtype: Annotated[str, typer.Option(help="In transformers: auto (the checkpoint's), bfloat16, float32.")] = "auto",
    packed: Annotated[
        bool | None,
        typer.Option(
            "--packed/--no-packed",
            help="In transformers: compute what prompts share once; by default in float32, where scores stay lm-eval's.",
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="In transformers: 8 on a CPU, else 32.")] = None,
    dataset: Annotated[str, typer.Option(help="Text for kl: a file, pydoc, wikitext or a hub id.")] = "pydoc",
    windows: Annotated[int, typer.Option(min=1, help="How many windows of it, next to each other.")] = 16,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    speed: Annotated[bool, typer.Option("--speed", help="Also measure tokens/s, first token, peak memory.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="For a URL: the served model's directory or hub id.")] = None,
    rerun: Annotated[bool, typer.Option("--rerun", help="Run again what is known from before.")] = False,
    llama_cpp: Annotated[
        bool, typer.Option("--llama-cpp", help="GGUF: the same as --runtime llama.cpp for kl.", hidden=True)
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the run here too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure a model: KL divergence from its base, perplexity, tasks with error bars and a paired test, memory and speed.

    Finished tasks are kept: run the same command again after a crash, or for another artifact of the same base.

    Examples:

    lowbit evaluate model-w4 --base ./model --dataset wikitext-2.test.txt --windows 64

    lowbit evaluate model-w4 --tasks mmlu,hellaswag,kl --limit 400 --data ./data --speed

    lowbit evaluate model.Q4_K_M.gguf --base ./model --runtime llama.cpp --tasks mmlu:5,kl
    """
    from lowbit.api.evaluation import Evaluation, evaluate_run
    from lowbit.api.runs import merged, read_run, run_file, write_run
    from lowbit.commands.progress import listener

    if llama_cpp and not artifact.endswith(".gguf"):
        raise RecipeError("--llama-cpp runs a .gguf file", hint="leave it out, or give the file")
    base = base or _recorded_base(artifact)
    wanted = Evaluation(
        tasks=tasks, limit=limit, shots=shots, data=data, runtime="llama.cpp" if llama_cpp else runtime, dtype=dtype,
        packed=packed, batch_size=batch_size, dataset=dataset, windows=windows, context=context, speed=speed, device=device,
        tokenizer=tokenizer, rerun=rerun,
    )  # fmt: skip
    with listener(quiet=quiet or as_json) as progress:
        run = evaluate_run(artifact, base=base, wanted=wanted, progress=progress)
    own = run_file(Path(artifact))
    if run["record"] is not None:
        write_run(merged(read_run(own) if own.is_file() else None, run), own)
    if output is not None:
        write_run(run, output)
    if as_json:
        shown = {key: value for key, value in run.items() if key not in ("record", "text")}
        print(json.dumps({**shown, **run.get("text", {})}, indent=2, ensure_ascii=False))
    else:
        _print(run)


def _print(run: dict[str, Any]) -> None:
    if "text" in run:
        _print_text(run)
    if "tasks" in run:
        _print_tasks(run)
    if "memory" in run:
        _print_memory(run["memory"])
    if "speed" in run:
        _print_speed(run["speed"])


def _print_text(run: dict[str, Any]) -> None:
    text = run["text"]
    if "perplexity" in text:
        print(
            f"{run['artifact']} on {text['dataset']}: {text['windows']} windows of {text['context']} tokens, next to each other"
        )
        print(f"perplexity       {text['perplexity']:.3f} ± {text['perplexity_error']:.3f}")
    if "kl" in text:
        print(f"base perplexity  {text['base_perplexity']:.3f}")
        print(f"KL divergence    {text['kl']:.5f} ± {text['kl_error']:.5f} nats; median {text['kl_median']:.5f}, "
              f"p99 {text['kl_p99']:.4f}, p99.9 {text['kl_p999']:.4f}")  # fmt: skip
        print(f"top-1 agreement  {text['top1']:.2%} ± {text['top1_error']:.2%}")
    elif run["base"] is None:
        print("no base to compare with: --base MODEL adds KL divergence and top-1 agreement")
    served = text.get("served")
    if served:
        dense = f"; dequantized KL over the same {served['dense_kl']:.5f}" if "dense_kl" in served else ""
        print(f"in {run['runtime']}     KL {served['kl']:.5f} ± {served['kl_error']:.5f} nats over its {served['listed']} "
              f"likeliest tokens, top-1 {served['top1']:.2%}, {served['tokens']} predictions{dense}")  # fmt: skip


def _print_tasks(run: dict[str, Any]) -> None:
    from rich.console import Console

    from lowbit.report.tables import task_notes, task_table

    console = Console(width=None if Console().is_terminal else 80)
    console.print(task_table(run["tasks"], title=f"{run['artifact']} on {run['runtime']}, lm-eval {run['lm_eval']}"))
    for line in task_notes(run["tasks"]):
        print(line)


def _print_memory(memory: dict[str, Any]) -> None:
    parts = ", ".join(f"{part} {size / 2**20:.1f}" for part, size in memory["weights"].items())
    print(f"weights          {memory['total'] / 2**20:.1f} MiB ({parts}); KV cache of {memory['batch']} x "
          f"{memory['context']} tokens {memory['cache'] / 2**20:.1f} MiB")  # fmt: skip


def _print_speed(speed: dict[str, Any]) -> None:
    if "error" in speed:
        print(f"speed            not measured: {speed['error']}")
        return
    peak = f", peak memory {speed['peak_memory'] / 2**20:.0f} MiB" if "peak_memory" in speed else ""
    decode = speed["decode_tokens_per_second"] or 0
    print(f"{speed['runtime']:<16} prefill {speed['prefill_tokens_per_second']:.0f} tokens/s, decode {decode:.1f} tokens/s, "
          f"first token {speed['time_to_first_token']:.2f} s{peak}")  # fmt: skip


def _recorded_base(artifact: str) -> str | None:
    """The base that an artifact names, when it is a local path that is still there."""
    path = Path(artifact)
    record = path.with_suffix(".lowbit.json") if path.suffix == ".gguf" else path / "lowbit.json"
    if not record.is_file():
        return None
    name = str(json.loads(record.read_text())["base"]["name"])
    return name if Path(name).exists() else None
