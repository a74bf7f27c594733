"""lowbit evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="Artifact, checkpoint directory, .gguf or hub id.")
    ],
    base: Annotated[str | None, typer.Option(help="Compare with this model: KL divergence, top-1 agreement.")] = None,
    dataset: Annotated[str, typer.Option(help="Text to measure on; a file, pydoc, wikitext or a hub id.")] = "pydoc",
    windows: Annotated[int, typer.Option(min=1, help="How many windows.")] = 16,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
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
    if as_json:
        print(json.dumps({"artifact": artifact, "base": base, "dataset": dataset, **measured.to_dict()}, indent=2))
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


def _recorded_base(artifact: str) -> str | None:
    """The base that an artifact names, when it is a local path that is still there."""
    record = Path(artifact) / "lowbit.json"
    if not record.is_file():
        return None
    name = str(json.loads(record.read_text())["base"]["name"])
    return name if Path(name).exists() else None
