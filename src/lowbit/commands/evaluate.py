"""lowbit evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.core.errors import RecipeError

if TYPE_CHECKING:
    from lowbit.core.progress import Progress


def evaluate(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="Artifact, checkpoint directory, .gguf or hub id.")
    ],
    base: Annotated[str | None, typer.Option(help="Compare with this model: KL divergence, top-1 agreement.")] = None,
    dataset: Annotated[str, typer.Option(help="Text to measure on; a file, pydoc, wikitext or a hub id.")] = "pydoc",
    windows: Annotated[int, typer.Option(min=1, help="How many windows.")] = 16,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
    llama_cpp: Annotated[
        bool,
        typer.Option("--llama-cpp", help="GGUF: also run it in the embedded llama.cpp, on 2 windows of 128 tokens."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure a model's perplexity and how far it is from its base, in float32, streamed block by block.

    Example: lowbit evaluate model-w4 --base ./model --dataset wikitext-2.test.txt --windows 64
    """
    from lowbit.api.evaluate import evaluate as run
    from lowbit.commands.progress import listener

    base = base or _recorded_base(artifact)
    with listener(quiet=quiet or as_json) as progress:
        measured = run(
            artifact, base=base, dataset=dataset, windows=windows, context=context, device=device, progress=progress
        )
        real = _in_llama_cpp(artifact, base, dataset, device, progress) if llama_cpp else None
    if as_json:
        extra = {} if real is None else {"llama_cpp": real}
        print(
            json.dumps(
                {"artifact": artifact, "base": base, "dataset": dataset, **measured.to_dict(), **extra}, indent=2
            )
        )
        return
    print(f"{artifact} on {dataset}: {measured.windows} windows of {measured.context} tokens, next to each other")
    print(f"perplexity       {measured.perplexity:.3f} ± {measured.perplexity_error:.3f}")
    if measured.kl is None:
        print("no base to compare with: --base MODEL adds KL divergence and top-1 agreement")
        return
    print(f"base perplexity  {measured.base_perplexity:.3f}")
    print(f"KL divergence    {measured.kl:.5f} ± {measured.kl_error:.5f} nats; median {measured.kl_median:.5f}, "
          f"p99 {measured.kl_p99:.4f}, p99.9 {measured.kl_p999:.4f}")  # fmt: skip
    print(f"top-1 agreement  {measured.top1:.2%} ± {measured.top1_error:.2%}")
    if real is not None:
        print(f"in llama.cpp     KL {real['kl']:.5f} ± {real['kl_error']:.5f} nats, top-1 {real['top1']:.2%}, "
              f"over {real['tokens']} tokens; dequantized KL over the same {real['dequantized_kl']:.5f}")  # fmt: skip


def _in_llama_cpp(artifact: str, base: str | None, dataset: str, device: str, progress: Progress) -> dict[str, Any]:
    from dataclasses import asdict

    from lowbit.api.gguf_evaluate import evaluate_llama_cpp

    if base is None or not artifact.endswith(".gguf"):
        raise RecipeError("--llama-cpp compares a .gguf file with its base", hint="--base MODEL")
    real, dense = evaluate_llama_cpp(artifact, base=base, dataset=dataset, device=device, progress=progress)
    return {**asdict(real), "dequantized_kl": dense}


def _recorded_base(artifact: str) -> str | None:
    """The base that an artifact names, when it is a local path that is still there."""
    path = Path(artifact)
    record = path.with_suffix(".lowbit.json") if path.suffix == ".gguf" else path / "lowbit.json"
    if not record.is_file():
        return None
    name = str(json.loads(record.read_text())["base"]["name"])
    return name if Path(name).exists() else None
