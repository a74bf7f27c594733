"""lowbit compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowbit.core.errors import CheckpointError


def compare(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT...", help="Directories made by lowbit quantize.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """One table over several artifacts: size, perplexity, KL divergence, agreement, time, memory; smallest KL first.

    Example: lowbit compare model-rtn model-gptq --markdown
    """
    from lowbit.report import tables

    rows = sorted((_row(artifact) for artifact in artifacts), key=lambda row: (row["kl"] is None, row["kl"] or 0.0))
    if as_json:
        print(json.dumps(rows, indent=2))
    elif markdown:
        print(tables.markdown(rows))
    else:
        tables.print_table(rows, title="verified on held-out windows, each against its own base")


def _row(artifact: Path) -> dict[str, object]:
    from lowbit.report.tables import row

    record = artifact / "lowbit.json"
    if not record.is_file():
        raise CheckpointError(
            f"{artifact} is no lowbit artifact: it has no lowbit.json", hint="lowbit quantize makes one"
        )
    content = json.loads(record.read_text())
    cost = artifact / "lowbit-run.json"
    return row(
        str(artifact), content, json.loads(cost.read_text()) if cost.is_file() else None, content.get("verification")
    )
