"""lowbit sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowbit.core.errors import RecipeError

_METHODS = "fp16,gptq,awq,int8_sq,fp8,nf4,q4_k_m,q3_k_s"


def sweep(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, .gguf file or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where artifacts and report go.")],
    methods: Annotated[str, typer.Option(help="Comma-separated: see lowbit methods.")] = _METHODS,
    dataset: Annotated[str, typer.Option(help="Calibration text.")] = "pydoc",
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    group_size: Annotated[str, typer.Option(help="Of methods with groups; auto picks one that fits.")] = "auto",
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="GGUF types from a .gguf that is quantized already.")
    ] = False,
    tasks: Annotated[str, typer.Option(help="As in lowbit evaluate; kl is always measured.")] = "kl",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items of each task.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Task data instead of the hub.")] = None,
    eval_dataset: Annotated[
        str | None, typer.Option(help="Text of kl; by default calibration's, where it was not calibrated on.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of it.")] = 8,
    context: Annotated[int, typer.Option(min=2, help="Tokens in each.")] = 512,
    dtype: Annotated[str, typer.Option(help="That tasks compute in: auto, bfloat16, float32.")] = "auto",
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Also time every artifact.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
    lang: Annotated[str, typer.Option(help="Of the report: en or zh.")] = "en",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Quantize a model with many methods and measure all, sharing what can be shared; ends with the table and report.html.

    Run it again to continue where it stopped, or with more methods.

    Example: lowbit sweep ./model --methods fp16,gptq,awq,q4_k_m --tasks hellaswag:200,kl --data ./data -o sweep
    """
    from lowbit.api.compare import compared
    from lowbit.api.evaluation import Evaluation
    from lowbit.api.gguf_options import is_gguf_method
    from lowbit.api.report import write_report
    from lowbit.api.run import Settings
    from lowbit.api.sweep import Sweep
    from lowbit.api.sweep import sweep as run
    from lowbit.commands.progress import listener
    from lowbit.report import compare_table

    names = tuple(filter(None, (name.strip() for name in methods.split(","))))
    if not names or len(set(names)) != len(names):
        raise RecipeError("--methods names none, or one twice", hint=f"such as {_METHODS}")
    if group_size != "auto" and not group_size.isdigit():
        raise RecipeError(f"--group-size {group_size!r} is not a number", hint="such as 128, or auto")
    evaluation = Evaluation(
        tasks=tasks, limit=limit, data=data, dtype=dtype, dataset=eval_dataset or dataset, windows=windows,
        context=min(context, seq_len) if eval_dataset is None else context, speed=speed, device=device,
        prompt_tokens=128, new_tokens=16,
    )  # fmt: skip
    size = group_size if group_size == "auto" else int(group_size)
    options = {name: {"allow_requantize": True} for name in names if allow_requantize and is_gguf_method(name)}
    wanted = Sweep(names, dataset, num_samples, seq_len, size, evaluation, options)
    with listener(quiet=quiet or as_json) as progress:
        done = run(model, output, wanted, settings=Settings(device), progress=progress)
    if done.artifacts:
        write_report(done.artifacts, output / "report.html", lang=lang)
        rows = compared(done.artifacts)
        if as_json:
            found = {
                "rows": rows,
                "failed": done.failed,
                "seconds": done.seconds,
                "report": str(output / "report.html"),
            }
            print(json.dumps(found, indent=2, ensure_ascii=False))
        else:
            compare_table.print_table(rows, title=f"{model}, {len(done.artifacts)} methods")
            print(f"report: {output / 'report.html'}")
    for method, why in done.failed.items():
        typer.echo(f"failed: {method}: {why}", err=True)
    if done.failed:
        raise typer.Exit(1)
