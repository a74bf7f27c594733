"""lowbit ps, logs and stop: servers that run on this machine."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.core.errors import ServeError

if TYPE_CHECKING:
    from lowbit.runtimes.state import ServerRecord

_POLL = 0.3


def ps(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """Show the servers that lowbit runs on this machine.

    Example: lowbit ps
    """
    from lowbit.runtimes.state import servers

    rows = [_row(record) for record in servers()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print("no server runs; lowbit serve MODEL --detach starts one")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "status", "runtime", "endpoint", "MiB", "since", header_style="bold")
    for row in rows:
        table.add_row(row["name"], row["status"], row["runtime"], row["url"], str(row["mib"]), _age(row["seconds"]))
    Console().print(table)


def logs(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As lowbit ps shows it.")],
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines; 0 all.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come, until it ends.")] = False,
) -> None:
    """Print the log of a server in the background.

    Example: lowbit logs llama-w4 -f
    """
    from pathlib import Path

    from lowbit.runtimes.state import find

    record = find(name)
    if record.log is None:
        raise ServeError(f"{name} runs in the foreground of another terminal, which shows its log", hint="lowbit ps")
    with Path(record.log).open(errors="replace") as stream:
        text = stream.read().splitlines()
        print("\n".join(text[-lines:] if lines else text), flush=True)
        while follow:
            alive = record.alive
            if more := stream.read():
                print(more, end="", flush=True)
            if not alive:
                return
            time.sleep(_POLL)


def stop(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="As lowbit ps shows them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that run.")] = False,
    patience: Annotated[float, typer.Option(help="Seconds to let it finish, then it is killed.")] = 45.0,
) -> None:
    """Stop servers: what they are answering is finished first.

    Example: lowbit stop llama-w4
    """
    from lowbit.runtimes.state import find, forget, servers

    if not names and not everything:
        raise ServeError("no server was named", hint="lowbit ps shows them; --all stops every one")
    chosen = servers() if everything else [find(name) for name in names or []]
    for record in chosen:
        how = _stop(record, patience)
        forget(record.name)
        print(f"{record.name}: {how}")


def _stop(record: ServerRecord, patience: float) -> str:
    import psutil

    if not record.alive:
        return "it had ended already"
    try:
        process = psutil.Process(record.pid)
        process.terminate()
        process.wait(patience)
    except psutil.NoSuchProcess:
        return "it had ended already"
    except psutil.TimeoutExpired:
        process.kill()  # its guard stops the runtime
        return "killed, it did not finish in time"
    return "stopped"


def _row(record: ServerRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "status": record.status if record.alive else "failed",
        "runtime": record.runtime,
        "url": record.url,
        "model": record.model,
        "artifact": record.artifact,
        "pid": record.pid,
        "mib": _mib(record),
        "seconds": round(time.time() - record.created),
        "log": record.log,
    }


def _mib(record: ServerRecord) -> int:
    """Resident memory of everything below the watching process."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(record.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total >> 20


def _age(seconds: int) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
