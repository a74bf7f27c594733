"""The side environments that lowbit can make, as data: one `NAME.toml` each, pinned to the last package.

Schema of a lock:

    description = "one line"
    python_min = "3.11"            # the Python versions the pins exist for: python_min <= version < python_below
    python_below = "3.14"
    size_mib = 3400                # on disk, about
    minutes = 3                    # to make, about
    check = ["-c", "import six"]   # argv for the finished environment's interpreter; exit code 0 makes it ready
    [[steps]]                      # one pip run each, in this order
    name = "torch"
    requirements = ["torch==2.13.0"]
    dependencies = true            # pip may add what these need; default false (--no-deps)
    torch = true                   # torch_index applies to this step; default false
    [[shims]]                      # optional: metadata of a distribution whose code comes under another name
    name = "vllm"
    version = "0.32.0+cpu"
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Step:
    """One `pip install`. `dependencies`: pip may add what the requirements need, held to the lock's own pins."""

    name: str
    requirements: tuple[str, ...]
    dependencies: bool = False
    torch: bool = False


@dataclass(frozen=True)
class Shim:
    """Package metadata, and nothing else, for a distribution whose code is installed under another name."""

    name: str
    version: str


@dataclass(frozen=True)
class EnvironmentSpec:
    """What an environment consists of; the fields are those of the schema above."""

    name: str
    description: str
    python_min: str
    python_below: str
    steps: tuple[Step, ...]
    check: tuple[str, ...]
    size_mib: int
    minutes: float
    shims: tuple[Shim, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what gets installed; another one makes an existing environment stale."""
        content = {k: v for k, v in asdict(self).items() if k not in ("description", "size_mib", "minutes")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def pins(self) -> tuple[str, ...]:
        """Every `package==version` of every step."""
        return tuple(r for step in self.steps for r in step.requirements if "==" in r)


def parse_spec(name: str, text: str) -> EnvironmentSpec:
    """A lock's TOML -> EnvironmentSpec. Raises TypeError or KeyError for a lock that does not follow the schema."""
    data = tomllib.loads(text)
    steps = tuple(Step(**{**step, "requirements": tuple(step["requirements"])}) for step in data.pop("steps"))
    shims = tuple(Shim(**shim) for shim in data.pop("shims", []))
    return EnvironmentSpec(name=name, steps=steps, shims=shims, check=tuple(data.pop("check")), **data)


def known() -> dict[str, EnvironmentSpec]:
    """The environments whose locks lowbit carries, by name, sorted."""
    locks = {f.name.removesuffix(".toml"): f for f in files(__name__).iterdir() if f.name.endswith(".toml")}
    return {name: parse_spec(name, locks[name].read_text()) for name in sorted(locks)}
