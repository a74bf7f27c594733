"""What is on disk of an environment: its state file, its lock, its removal. All under ROOT/NAME, ROOT/.NAME.lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lowbit.core.errors import SideEnvironmentError

STATE_FILE = "lowbit-environment.json"


@dataclass(frozen=True)
class State:
    """How far an environment is. `completed`: titles of finished steps; `size_mib` is known once it is ready."""

    fingerprint: str
    completed: tuple[str, ...] = ()
    ready: bool = False
    size_mib: int | None = None


@contextlib.contextmanager
def locked(target: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold the environment's exclusive lock; yields its descriptor. `waiting` is called if another process has it.

    The lock file stays: deleting it would let two processes lock two different files of one name. An error of the
    file system while the lock is held becomes a SideEnvironmentError.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target.parent / f".{target.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SideEnvironmentError(
            f"{target.parent} cannot be written ({error.strerror}); nothing was changed.",
            hint="name another place with --root, or set XDG_CACHE_HOME",
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    except OSError as error:
        raise SideEnvironmentError(
            f"The environment in {target} could not be changed: {error}.", hint="run the same command again"
        ) from error
    finally:
        os.close(descriptor)


def read_state(target: Path) -> State | None:
    """None when there is no environment; a state that cannot be read counts as that of another lock."""
    try:
        data = json.loads((target / STATE_FILE).read_text())
        return State(**{**data, "completed": tuple(data["completed"])})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return State("unreadable")


def write_state(target: Path, state: State) -> None:
    """Atomic, so that a reader sees the old state or the new one and never half of it."""
    temporary = target / f"{STATE_FILE}.tmp"
    temporary.write_text(json.dumps(asdict(state), indent=1))
    temporary.replace(target / STATE_FILE)


def completed(target: Path, state: State, step: str) -> State:
    """The state with one more finished step, written."""
    state = replace(state, completed=(*state.completed, step))
    write_state(target, state)
    return state


def delete(target: Path) -> None:
    """Delete an environment. Renamed first: a deletion that breaks off leaves nothing that looks like an environment.
    Raises SideEnvironmentError for a directory that lowbit did not make."""
    doomed = target.with_name(f".{target.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    if target.exists():
        if not (target / STATE_FILE).exists():
            raise SideEnvironmentError(
                f"{target} exists and was not made by lowbit; it was left as it is.",
                hint="name another place with --root",
            )
        target.rename(doomed)
        shutil.rmtree(doomed)


def size_mib(target: Path) -> int:
    """What the files of an environment hold, in MiB."""
    return sum(f.lstat().st_size for f in target.rglob("*") if f.is_file()) >> 20
