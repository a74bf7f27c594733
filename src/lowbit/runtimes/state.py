"""The servers that lowbit runs on this machine: a small JSON file each, and the log of those in the background."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from lowbit.core.errors import ServeError, did_you_mean


@dataclass(frozen=True)
class ServerRecord:
    """name: unique among those that run. pid, created: of the lowbit process that watches the runtime, and its start in
    seconds since 1970 (process numbers are used again). status: "starting", "ready" or "failed". log: None in the
    foreground. Keys are never written here."""

    name: str
    pid: int
    created: float
    artifact: str
    runtime: str
    url: str
    model: str
    status: str
    log: str | None = None

    @property
    def alive(self) -> bool:
        """Whether its process is still there."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return bool(abs(process.create_time() - self.created) < 2 and process.status() != psutil.STATUS_ZOMBIE)
        return False


def default_root() -> Path:
    """`$XDG_STATE_HOME/lowbit/servers`, by default `~/.local/state/lowbit/servers`."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local/state") / "lowbit" / "servers"


def write(record: ServerRecord, root: Path | None = None) -> None:
    """Store or replace a record, whole. Where that is not allowed (a container's read-only home) the server is only not
    listed."""
    folder = root or default_root()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = folder / f".{record.name}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(record), indent=2))
        temporary.replace(folder / f"{record.name}.json")


def update(record: ServerRecord, status: str, root: Path | None = None) -> ServerRecord:
    """The record with another status, stored."""
    changed = replace(record, status=status)
    write(changed, root)
    return changed


def forget(name: str, root: Path | None = None) -> None:
    """Remove a record; its log stays until a server of that name starts again."""
    with contextlib.suppress(OSError):
        ((root or default_root()) / f"{name}.json").unlink(missing_ok=True)


def open_log(name: str, root: Path | None = None) -> Path:
    """An empty log for a server in the background. Raises ServeError when it cannot be made."""
    file = (root or default_root()) / f"{name}.log"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.write_text("")
    except OSError as error:
        raise ServeError(
            f"{file} cannot be written: {error.strerror}", hint="leave --detach out, or set XDG_STATE_HOME"
        ) from error
    return file


def servers(root: Path | None = None) -> list[ServerRecord]:
    """All that run, by name. Records of processes that are gone are removed, unless they tell of a failure in the
    background."""
    folder = root or default_root()
    found = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        record = _read(file)
        if record is None or (not record.alive and not (record.status == "failed" and record.log)):
            file.unlink(missing_ok=True)
        else:
            found.append(record)
    return found


def find(name: str, root: Path | None = None) -> ServerRecord:
    """The server called `name`. Raises ServeError with the nearest name."""
    known = {record.name: record for record in servers(root)}
    if name in known:
        return known[name]
    near = did_you_mean(name, known)
    raise ServeError(f"there is no server called {name!r}{near}", hint="lowbit ps shows the servers that run")


def free_name(wanted: str, root: Path | None = None) -> str:
    """`wanted` as a file name; numbered when a running server has it."""
    base = re.sub(r"[^\w.-]+", "-", wanted).strip("-.") or "model"
    taken = {record.name for record in servers(root) if record.alive}
    return next(name for name in (base, *(f"{base}-{n}" for n in range(2, 10_000))) if name not in taken)


def _read(file: Path) -> ServerRecord | None:
    try:
        return ServerRecord(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None
