"""lowbit compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_ARTIFACT...", help="Artifacts, with what lowbit evaluate measured; or run files."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """One table over several artifacts: size, divergence, task scores with error bars and verdicts, speed; smallest KL first.

    Example: lowbit compare model-rtn model-gptq --markdown
    """
    from lowbit.api.compare import compared
    from lowbit.report import compare_table

    rows = compared(runs)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif as_csv:
        print(compare_table.as_csv(rows), end="")
    elif markdown:
        print(compare_table.as_markdown(rows))
    else:
        compare_table.print_table(rows, title="each against its own base")
