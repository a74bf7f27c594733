"""lowbit fit."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.commands.parse import parse_bytes

if TYPE_CHECKING:
    from lowbit.api.fit import Fit
    from lowbit.recommend.memory import Place


def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, unquantized .gguf file or hub id.")],
    size: Annotated[str | None, typer.Option(help="Largest file: 100MiB.")] = None,
    like: Annotated[str | None, typer.Option(help="As large as this file type or method: q4_k_m, gptq.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Largest memory when served (by llama.cpp or vLLM), cache and all: 6GiB.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="gguf: a type for every tensor; compressed-tensors: bits for every group of layers."),
    ] = None,
    context: Annotated[int, typer.Option(help="With --max-memory: tokens of a request.")] = 4096,
    concurrency: Annotated[int, typer.Option(help="With --max-memory: requests at once.")] = 1,
    dataset: Annotated[str, typer.Option(help="Calibration text.")] = "pydoc",
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    effort: Annotated[
        str, typer.Option(help="Of what is then written: fast, balanced, or best (trained rounding, a last pass).")
    ] = "balanced",
    tune_codes: Annotated[bool | None, typer.Option(help="As in lowbit quantize: train codes too.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Write the recipe here.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.gguf|DIR", help="Then quantize with it, and measure.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the allocation as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Choose the bits of every part of a model so that a budget of bytes costs the least accuracy.

    Examples:

    lowbit fit ./model --like q4_k_m --dataset wikitext -o model-fit.gguf

    lowbit fit ./model --like q4_k_m --dataset wikitext --num-samples 128 --seq-len 1024 --effort best -o model-fit.gguf

    lowbit fit ./model --max-memory 6GiB --context 8192 --recipe fit.yaml

    lowbit fit ./model --format compressed-tensors --like gptq -o model-mixed
    """
    from lowbit.api.effort import resolved, with_effort
    from lowbit.api.fit import fit as fit_gguf
    from lowbit.api.fit_layers import fit_layers
    from lowbit.api.quantize import quantize, recipe_for
    from lowbit.api.run import Settings
    from lowbit.commands.progress import listener
    from lowbit.recipe import Calibration

    gguf = format == "gguf" or (format is None and (output is None or output.suffix == ".gguf"))
    run = fit_gguf if gguf else functools.partial(fit_layers, format=format or "compressed-tensors")
    with_effort(recipe_for("q4_k_m" if gguf else "gptq"), effort)  # an unknown one is refused before any work
    budget = parse_bytes(size)
    if max_memory is not None:
        from lowbit.api.memory import serving_memory

        method, runtime = ("q4_k_m", "llama.cpp") if gguf else ("gptq", "vllm")
        place: Place = "cpu" if gguf else "gpu"
        parts = serving_memory(model, method, runtime=runtime, place=place, context=context, concurrency=concurrency)
        budget = (parse_bytes(max_memory) or 0) - (parts.total - parts.weights)
    with listener(quiet=quiet or as_json) as progress:
        found = run(
            model,
            size=budget,
            like=like,
            calibration=Calibration(dataset=dataset, num_samples=num_samples, seq_len=seq_len),
            device=device,
            progress=progress,
        )
        chosen = resolved(found.recipe, effort, model, device, tune_codes=tune_codes)
        if recipe is not None:
            recipe.write_text(chosen.yaml())
        made = None
        if output is not None:
            made = quantize(model, output=output, recipe=chosen, settings=Settings(device), progress=progress)
    measured = None if made is None else made.measurement
    if as_json:
        print(json.dumps({
            "bytes": found.nbytes, "predicted_kl": found.kl, "bound": found.bound, "types": found.types,
            "like": {name: {"bytes": size, "predicted_kl": kl} for name, (size, kl) in found.like.items()},
            "recipe": chosen.model_dump(mode="json"), "measured": measured,
        }, indent=2))  # fmt: skip
        return
    _print(found, measured, recipe, output, gguf)


def _print(found: Fit, measured: dict[str, Any] | None, recipe: Path | None, output: Path | None, gguf: bool) -> None:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    table = Table("types", "MiB", "predicted KL", header_style="bold")
    for name, (size, kl) in sorted(found.like.items(), key=lambda item: item[1][0]):
        table.add_row(name, f"{size / 2**20:.1f}", f"{kl:.4f}")
    mixture = ", ".join(f"{count} {name}" for name, count in Counter(found.types.values()).most_common())
    table.add_row(f"fit: {mixture}", f"{found.nbytes / 2**20:.1f}", f"[bold]{found.kl:.4f}[/]")
    console = Console()
    console.print(table)
    gap = found.kl / found.bound - 1 if found.bound > 0 else 0.0
    rounding = "second-order rounding" if gguf else "rounding by GPTQ without its second stream"
    console.print(
        f"no mixture of this size is predicted to be more than {gap:.1%} better; predictions are of {rounding}, without what "
        "errors of earlier blocks add"
    )
    if measured is not None:
        console.print(f"{output}: measured KL {measured['kl']:.4f} ± {measured['kl_error']:.4f} on held-out text")
    elif recipe is not None:
        console.print(f"next: lowbit quantize MODEL --recipe {recipe} -o {'model.gguf' if gguf else 'model-mixed'}")
