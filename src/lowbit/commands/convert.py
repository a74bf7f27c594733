"""lowbit convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="A quantized directory, of lowbit or another tool.")
    ],
    format: Annotated[str, typer.Option("--format", help="gptq, gptq_v2, awq, compressed-tensors ...")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the converted artifact goes.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Re-pack the same integers into another format, bit for bit, or say why that cannot be done.

    Example: lowbit convert model-gptq --format compressed-tensors -o model-ct
    """
    from lowbit.api.convert import convert as run
    from lowbit.commands.progress import listener

    with listener(quiet=quiet) as progress:
        path = run(artifact, format=format, output=output, progress=progress)
    print(path)
