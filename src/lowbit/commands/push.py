"""lowbit push."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def push(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A directory or .gguf file of lowbit quantize.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is only yours to see.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.", show_default="main")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the files and their sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Upload an artifact with its model card to the Hugging Face hub, after its checksums were verified.

    Example: lowbit push llama-w4 my-org/llama-3-8b-w4a16 --dry-run
    """
    from lowbit.api.push import push as upload
    from lowbit.api.push import push_plan

    plan = push_plan(artifact, repo, private=private)
    url = None if dry_run else upload(plan, revision=revision, message=message)
    if as_json:
        print(json.dumps({**plan.to_dict(), "url": url}, indent=2))
        return
    for file in plan.files:
        print(f"{file.bytes / 2**20:>10,.2f} MiB  {file.name}")
    checked = "checksums verified" if plan.verified else "no checksums to verify"
    print(f"{plan.bytes / 2**20:>10,.2f} MiB  in {len(plan.files)} files, {checked}")
    print(f"{url}" if url else f"nothing was uploaded to {repo} (--dry-run)")
