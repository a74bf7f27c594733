"""lowbit chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.core.errors import ServeError

if TYPE_CHECKING:
    from lowbit.api.chat import Conversation


def chat(
    target: Annotated[
        str | None, typer.Argument(metavar="[URL|ARTIFACT]", help="By default the server that lowbit ps shows.")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(metavar="A B", help="Ask two the same question, side by side.")
    ] = None,
    ask: Annotated[
        list[str] | None, typer.Option("--ask", "-a", help="Ask this and end; repeatable, one conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is always the same answer.")] = 0.7,
    runtime: Annotated[str | None, typer.Option(help="For an artifact.", show_default="what suits best")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    python: Annotated[
        Path | None, typer.Option("--python", "--program", metavar="PATH", help="As in lowbit serve.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="For an address that serves several.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="LOWBIT_API_KEY", help="For an address.")] = None,
    patience: Annotated[float, typer.Option(help="Seconds to wait for the first completion.")] = 600.0,
) -> None:
    """Talk to a served model or an artifact in the terminal, streaming. /new begins anew, /quit or Ctrl-D ends.

    Examples:

    lowbit chat http://127.0.0.1:8000/v1

    lowbit chat model-Q4_K_M.gguf -a "Why is the sky blue?"

    lowbit chat --compare model-Q4_K_M.gguf model-Q8_0.gguf --temperature 0
    """
    from lowbit.api.chat import conversations

    targets = list(compare) if compare else [target or _running()]
    print(f"starting {', '.join(targets)}", file=sys.stderr, flush=True)
    with conversations(targets, runtime=runtime, device=device, program=python, key=api_key, model=model,
                       system=system, patience=patience) as talks:  # fmt: skip
        try:
            for question in ask or _questions():
                if question == "/new":
                    for talk in talks:
                        talk.forget()
                elif compare:
                    _side_by_side(talks, question, max_tokens, temperature)
                else:
                    for piece in talks[0].ask(question, max_tokens=max_tokens, temperature=temperature):
                        print(piece, end="", flush=True)
                    print()
        except KeyboardInterrupt:
            print()


def _running() -> str:
    from lowbit.runtimes.state import servers

    ready = [record for record in servers() if record.status == "ready" and record.alive]
    if len(ready) != 1:
        raise ServeError(
            "no server runs" if not ready else f"{len(ready)} servers run: {', '.join(r.name for r in ready)}",
            hint="lowbit chat URL, or lowbit chat ARTIFACT, which is served for as long as you talk",
        )
    return ready[0].url


def _questions() -> Iterator[str]:
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if question == "/quit":
            return
        if question:
            yield question


def _side_by_side(talks: list[Conversation], question: str, max_tokens: int, temperature: float) -> None:
    """Both answers in columns, growing as they stream; plain blocks one after the other where there is no terminal."""
    import threading

    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    said = ["" for _ in talks]
    failed: list[Exception] = []

    def listen(index: int) -> None:
        try:
            for piece in talks[index].ask(question, max_tokens=max_tokens, temperature=temperature):
                said[index] += piece
        except ServeError as error:
            failed.append(error)

    def table() -> Table:
        grid = Table(*[talk.name for talk in talks], expand=True, header_style="bold")
        grid.add_row(*said)
        return grid

    threads = [threading.Thread(target=listen, args=(index,), daemon=True) for index in range(len(talks))]
    for thread in threads:
        thread.start()
    console = Console()
    if console.is_terminal:
        with Live(table(), console=console, refresh_per_second=8) as live:
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(0.1)
                live.update(table())
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    if not console.is_terminal:
        for talk, answer in zip(talks, said, strict=True):
            print(f"[{talk.name}]\n{answer.strip()}\n")
    elif all(answer == said[0] for answer in said):
        console.print("both say the same", style="dim")
