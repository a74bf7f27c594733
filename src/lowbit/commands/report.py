"""lowbit report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_ARTIFACT...", help="Artifacts, or what lowbit evaluate -o wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the page goes.")] = Path(
        "report.html"
    ),
    lang: Annotated[str, typer.Option(help="en or zh.")] = "en",
) -> None:
    """One self-contained page: table, accuracy against size and speed, errors by layer, divergence by token, provenance.

    Example: lowbit report model-gptq model-awq run.json -o report.html
    """
    from lowbit.api.report import write_report

    write_report(runs, output, lang=lang)
    print(output)
