"""The guide's rules, read from guide.yaml: which scenario, which methods it prefers, what the hardware rules out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from lowbit.core.errors import RecipeError, did_you_mean
from lowbit.recommend.hardware import Hardware
from lowbit.recommend.words import Text


@dataclass(frozen=True)
class MethodRule:
    """What the guide says of a method in general; bits: of one weight with its metadata. See guide.yaml."""

    name: str
    runtimes: tuple[str, ...]
    recovery: float
    bits: float
    source: str
    speed: float = 1.0
    double: bool = False


@dataclass(frozen=True)
class Verdict:
    """A rule that applies. effect: "out", "hide" (out, and not worth a word) or "note"; speed: factor of decoding."""

    rule: str
    effect: str
    text: Text
    speed: float = 1.0


def methods() -> dict[str, MethodRule]:
    """Every method that can be recommended."""
    found = {}
    for name, entry in _guide()["methods"].items():
        given = {**entry, "runtimes": tuple(entry["runtimes"]), "source": _guide()["sources"][entry["source"]]}
        found[name] = MethodRule(name, **given)
    return found


def scenarios() -> list[str]:
    """The guide's scenarios."""
    return list(_guide()["scenarios"])


def pick_scenario(hardware: Hardware, min_recovery: float | None) -> str:
    """The scenario that hardware and wishes amount to, when none is named."""
    if min_recovery is not None and min_recovery >= 99:
        return "high-accuracy"
    if hardware.kind == "board":
        return "edge" if hardware.memory <= 8 * 2**30 else "cpu"
    if hardware.kind in ("cpu", "apple"):
        return "cpu"
    return "production-gpu" if hardware.tier == "datacenter" and hardware.memory >= 20 * 2**30 else "low-end-gpu"


def preference(scenario: str) -> list[str]:
    """Methods of a scenario, best first. Raises RecipeError for one that is not known."""
    known = _guide()["scenarios"]
    if scenario not in known:
        raise RecipeError(
            f"scenario {scenario!r} is unknown{did_you_mean(scenario, known)}", hint=f"one of {', '.join(known)}"
        )
    order: list[str] = known[scenario]["prefer"]
    return order


def reason(scenario: str, method: str) -> Text | None:
    """Why the scenario's guide names the method, where it does."""
    entry = _guide()["scenarios"][scenario]["reasons"].get(method)
    return None if entry is None else Text(entry["en"], entry["zh"], _guide()["sources"][entry["source"]])


def usable_share(hardware: Hardware) -> float:
    """The share of a device's memory that serving may take."""
    share: float = _guide()["usable"][hardware.kind]
    return share


def loss_factor(parameters: float) -> float:
    """How many times a 7B model's loss a model of this size has."""
    steps = _guide()["size_factors"]
    return float(next(factor for limit, factor in steps if parameters <= limit))


def verdicts(method: str, runtime: str, hardware: Hardware) -> list[Verdict]:
    """The rules that apply to a method in a runtime on this hardware."""
    found = []
    for rule in _guide()["rules"]:
        named = method in rule.get("methods", ()) or runtime in rule.get("runtimes", ())
        if named and _holds(rule["when"], hardware):
            filled = {lang: rule[lang].format(name=hardware.name, cc=hardware.cc) for lang in ("en", "zh")}
            text = Text(filled["en"], filled["zh"], _guide()["sources"][rule["source"]])
            found.append(Verdict(rule["id"], rule["effect"], text, rule.get("speed", 1.0)))
    return found


def _holds(when: Mapping[str, Any], hardware: Hardware) -> bool:
    checks: dict[str, Callable[[Any], bool]] = {
        "cc_below": lambda value: 0 < hardware.cc < value,
        "cc_from": lambda value: hardware.cc >= value,
        "vendor": lambda value: hardware.vendor == value,
        "not_vendor": lambda value: hardware.vendor != value,
        "kind": lambda value: hardware.kind == value,
        "place": lambda value: hardware.place == value,
        "lacks": lambda value: value not in hardware.features,
        "has": lambda value: value in hardware.features,
    }
    return all(checks[name](value) for name, value in when.items())


@cache
def _guide() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(resources.files("lowbit.recommend").joinpath("guide.yaml").read_text())
    return content
