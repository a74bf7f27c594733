"""Managed side environments: virtual environments in the user cache for software that cannot share lowbit's own.

vLLM pins transformers and compressed-tensors, the GGUF converter carries its own gguf package, peers in benchmarks pin
torch. Each gets one environment, described as data in `locks/NAME.toml` and pinned there to the last package, and
lowbit talks to it as a child process:

    add("llm-compressor")                                    # or: lowbit env add llm-compressor
    answer = run_json("llm-compressor", ["script.py", "--bits", "4"])

Building is resumable: a step that finished is never done again, one that broke off is continued. An environment counts
as ready only after its check command passed, and only as long as the lock it was built from is the one lowbit carries.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lowbit.core.errors import SideEnvironmentError, did_you_mean
from lowbit.locks import EnvironmentSpec, Shim, Step, known, parse_spec
from lowbit.locks.install import check, child_variables, create, install, interpreter, quote
from lowbit.locks.state import STATE_FILE, State, completed, delete, locked, read_state, size_mib, write_state

__all__ = [
    "EnvironmentSpec", "EnvironmentStatus", "Progress", "Shim", "Step", "add", "child_variables", "default_root",
    "known", "list_environments", "parse_spec", "python_of", "remove", "run_json", "shared_root",
]  # fmt: skip

Standing = Literal["missing", "partial", "stale", "ready", "unknown"]


@dataclass(frozen=True)
class Progress:
    """Where a build stands: `step` of `steps` (from 1), its `title`, the latest `line` of pip's output ("" at first).
    While it waits for another process, both numbers are 0."""

    step: int
    steps: int
    title: str
    line: str = ""


@dataclass(frozen=True)
class EnvironmentStatus:
    """One row of `lowbit env list`. In MiB: `size_mib` on disk (None until ready), `expected_mib` from the lock."""

    name: str
    state: Standing
    path: Path
    size_mib: int | None
    expected_mib: int | None
    description: str


def default_root() -> Path:
    """`$XDG_CACHE_HOME/lowbit/envs`, by default `~/.cache/lowbit/envs`; a relative XDG_CACHE_HOME is ignored, as its
    specification asks."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "lowbit" / "envs"


def shared_root() -> Path:
    """`share/lowbit/envs` beside this Python: environments that an image brings along, for users whose cache is empty or
    whose root is read-only. `lowbit env add NAME --root` makes them there; they are only read afterwards."""
    return Path(sys.prefix) / "share" / "lowbit" / "envs"


def add(
    environment: str | EnvironmentSpec,
    root: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    torch_index: str | None = None,
) -> Path:
    """Build an environment, or continue a build that broke off; returns its interpreter, at once if it is ready.

    `torch_index` is the package index that torch alone comes from (https://download.pytorch.org/whl/cpu has the small
    CPU build for Linux; PyPI's carries CUDA). Two processes that add the same environment do not disturb each other:
    the second waits, then finds it ready. Raises SideEnvironmentError.
    """
    spec = _spec(environment)
    _refuse_python(spec)
    target = _target(spec.name, root)
    report = progress or (lambda _: None)
    with locked(target, lambda: report(Progress(0, 0, "wait", "another process is at work on it"))) as lock:
        state = read_state(target)
        if state is None or state.fingerprint != spec.fingerprint or _lost_interpreter(state, target):
            delete(target)
            state = State(spec.fingerprint)
        if not state.ready:
            _build(spec, target, state, report, torch_index, lock)
    return interpreter(target)


def remove(name: str, root: Path | None = None) -> bool:
    """Delete an environment; False when there was none. Waits for a process that is building it."""
    target = _target(name, root)
    if not target.is_dir():
        return False
    with locked(target):
        delete(target)
    return True


def list_environments(root: Path | None = None) -> list[EnvironmentStatus]:
    """Every environment that lowbit knows, then those in `root` that it does not know (any more)."""
    places, specs = _places(root), known()
    own = places[-1]
    found = [p.name for p in sorted(own.iterdir()) if (p / STATE_FILE).is_file()] if own.is_dir() else []
    rows = []
    for name in [*specs, *(n for n in found if n not in specs and not n.startswith("."))]:
        spec = specs.get(name)
        states = {place / name: read_state(place / name) for place in places}
        target = next((t for t, state in states.items() if _standing(spec, state, t) == "ready"), own / name)
        state = states[target]
        rows.append(
            EnvironmentStatus(
                name=name,
                state=_standing(spec, state, target),
                path=target,
                size_mib=state.size_mib if state else None,
                expected_mib=spec.size_mib if spec else None,
                description=spec.description if spec else "not an environment of this version of lowbit",
            )
        )
    return rows


def python_of(environment: str | EnvironmentSpec, root: Path | None = None) -> Path:
    """The interpreter of a ready environment; without a `root`, the user's own or a shared one. Raises SideEnvironmentError
    that names the command which makes it."""
    spec = _spec(environment)
    for place in _places(root):
        target = _target(spec.name, place)
        standing = _standing(spec, read_state(target), target)
        if standing == "ready":
            return interpreter(target)
    why = {"missing": "is not installed", "partial": "is not finished", "stale": "is of another version of lowbit"}
    raise SideEnvironmentError(
        f"The side environment {spec.name!r} {why[standing]} ({target}); it takes about {spec.size_mib:,} MiB and "
        f"{spec.minutes:g} minutes.",
        hint=f"lowbit env add {spec.name}",
    )


def run_json(
    environment: str | EnvironmentSpec,
    argv: Sequence[str],
    *,
    root: Path | None = None,
    variables: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Any:
    """Run the environment's interpreter with `argv`; returns the JSON that it printed as the last line of its stdout.

    `variables` are added to the environment variables, `timeout` is in seconds. Raises SideEnvironmentError, with the
    last lines of stderr, when the program fails, runs out of time, or prints no JSON.
    """
    python = python_of(environment, root)
    what = f"The program {' '.join(argv[:1])} in the side environment {_spec(environment).name!r}"
    try:
        done = subprocess.run(
            [str(python), *argv],
            env=child_variables(variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise SideEnvironmentError(f"{what} did not finish in {timeout:g} seconds and was stopped.") from error
    if done.returncode != 0:
        raise SideEnvironmentError(f"{what} failed with exit code {done.returncode}:{quote(done.stderr.splitlines())}")
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1] if lines else "")
    except json.JSONDecodeError as error:
        raise SideEnvironmentError(f"{what} printed no JSON:{quote([*lines, *done.stderr.splitlines()])}") from error


def _build(
    spec: EnvironmentSpec,
    target: Path,
    state: State,
    report: Callable[[Progress], None],
    torch_index: str | None,
    lock: int,
) -> None:
    titles = ["create", *(step.name for step in spec.steps), "check"]

    def say(number: int) -> Callable[[str], None]:
        title = titles[number - 1]
        report(Progress(number, len(titles), title))
        return lambda line: report(Progress(number, len(titles), title, line))

    _require_space(spec, target, state)
    if "create" not in state.completed:
        target.mkdir(exist_ok=True)
        write_state(target, state)
        create(spec, target, say(1), lock)
        state = completed(target, state, "create")
    for number, step in enumerate(spec.steps, start=2):
        if step.name not in state.completed:
            install(spec, step, target, say(number), torch_index, lock)
            state = completed(target, state, step.name)
    check(spec, target, say(len(titles)), lock)
    write_state(target, replace(state, ready=True, size_mib=size_mib(target)))


def _require_space(spec: EnvironmentSpec, target: Path, state: State) -> None:
    free = shutil.disk_usage(target.parent).free // 2**20
    needed = spec.size_mib - (size_mib(target) if state.completed else 0)
    if free < needed:
        raise SideEnvironmentError(
            f"The environment {spec.name!r} needs about {needed:,} MiB more in {target.parent}, where {free:,} MiB are "
            "free; nothing was installed.",
            hint="free some space, or name another place with --root",
        )


def _refuse_python(spec: EnvironmentSpec) -> None:
    low, high = (tuple(int(part) for part in v.split(".")) for v in (spec.python_min, spec.python_below))
    if not low <= sys.version_info[:2] < high:
        raise SideEnvironmentError(
            f"The environment {spec.name!r} needs Python {spec.python_min} or later, before {spec.python_below}; "
            f"lowbit runs on {sys.version_info.major}.{sys.version_info.minor}, so nothing was installed.",
            hint=f"install lowbit in a virtual environment of Python {spec.python_min}",
        )


def _spec(environment: str | EnvironmentSpec) -> EnvironmentSpec:
    if isinstance(environment, EnvironmentSpec):
        return environment
    specs = known()
    if environment not in specs:
        near = did_you_mean(environment, specs)
        raise SideEnvironmentError(f"There is no side environment {environment!r}{near}.", hint="lowbit env list")
    return specs[environment]


def _target(name: str, root: Path | None) -> Path:
    if not name or name.startswith(".") or Path(name).name != name:
        raise SideEnvironmentError(f"{name!r} is not the name of a side environment.", hint="lowbit env list")
    return (root or default_root()).absolute() / name


def _places(root: Path | None) -> list[Path]:
    """Where environments are looked for; the last is where they are made."""
    return [shared_root(), default_root().absolute()] if root is None else [root.absolute()]


def _standing(spec: EnvironmentSpec | None, state: State | None, target: Path) -> Standing:
    if spec is None:
        return "unknown"
    if state is None:
        return "missing"
    if state.fingerprint != spec.fingerprint:
        return "stale"
    return "ready" if state.ready and interpreter(target).exists() else "partial"


def _lost_interpreter(state: State, target: Path) -> bool:
    """Whether the Python that the environment was made of is gone, as after a system upgrade."""
    return "create" in state.completed and not interpreter(target).exists()
