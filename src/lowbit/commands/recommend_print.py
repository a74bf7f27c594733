"""A recommendation on a terminal: a table, a bar of memory, reasons, and what to type next."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lowbit.api.recommend import next_commands
from lowbit.recommend.candidates import Candidate
from lowbit.recommend.engine import Recommendation
from lowbit.recommend.memory import MemoryParts
from lowbit.recommend.words import amount, text

_BAR = 60
_BLOCKS = {"weights": "█", "cache": "▓", "activations": "▒", "overhead": "░", "free": "·"}
_GIB = 2**30


def show(answer: Recommendation, language: str) -> None:
    """Print it in "en" or "zh"."""
    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    hardware = answer.hardware
    count = f"{hardware.devices} x " if hardware.devices > 1 else ""
    facts = f"{hardware.memory / _GIB:.0f} GiB, {hardware.bandwidth / 1e9:.0f} GB/s" + (
        f", compute capability {hardware.cc:g}" if hardware.cc else ""
    )
    console.print(f"{answer.model.name}: {answer.model.parameters / 1e9:.2f}B parameters")
    console.print(f"{count}{hardware.name} ({facts}); {_say('scenario', language)} {answer.scenario}")
    console.print()
    console.print(_say("best" if answer.possible else "nearest", language) + ":", style="bold")
    console.print(_table(answer, language))
    best = answer.ranked[0] if answer.ranked else None
    if best is not None:
        console.print(bar(best.parts, best.budget, language))
        _explain(console, answer, best, language)
    for line in answer.advice:
        console.print(f"{_say('advice', language)}: {line.say(language)}", style="bold")
    if best is not None:
        console.print(f"{_say('next', language)}:", style="bold")
        for command in next_commands(answer, best):
            console.print(f"  {command}", soft_wrap=True)
    if answer.ruled_out:
        console.print(f"{_say('out', language)}:", style="bold")
    for ruled in answer.ruled_out:
        console.print(f"  {ruled.method} ({ruled.runtime}): {ruled.text.say(language)}", soft_wrap=True)


def bar(parts: MemoryParts, budget: int, language: str) -> str:
    """The parts of serving's memory beside what can be used, as a line of blocks and a legend."""
    sizes = {"weights": parts.weights, "cache": max(parts.cache, parts.reserved), "activations": parts.activations,
             "overhead": parts.overhead}  # fmt: skip
    sizes["free"] = max(budget - parts.needed, 0)
    whole = max(budget, parts.needed, 1)
    line, ends, at = "", 0.0, 0
    for name, size in sizes.items():
        ends += size / whole * _BAR
        line += _BLOCKS[name] * (round(ends) - at)
        at = round(ends)
    legend = "  ".join(f"{_BLOCKS[name]} {_say(name, language)} {amount(size)}" for name, size in sizes.items())
    return f"|{line}| {amount(parts.needed)} / {amount(budget)}\n {legend}"


def _table(answer: Recommendation, language: str) -> Table:
    table = Table(header_style="bold")
    for number, heading in enumerate(_say("columns", language).split("|")):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for candidate in answer.ranked:
        speed = candidate.speed
        table.add_row(
            candidate.option.method, candidate.runtime, f"{candidate.option.file / _GIB:.2f}",
            f"{candidate.parts.needed / _GIB:.2f}", f"{speed.decode:.1f}", f"{speed.prefill:.0f}",
            f"{candidate.recovery:.1f}%", str(candidate.context), str(candidate.concurrency),
        )  # fmt: skip
    wishes = answer.wishes
    budget = answer.ranked[0].budget if answer.ranked else 0
    table.add_row(
        f"({_say('asked', language)})", "", "", f"≤ {budget / _GIB:.2f}",
        "-" if wishes.min_tokens_per_s is None else f"≥ {wishes.min_tokens_per_s:g}", "-",
        "-" if wishes.min_recovery is None else f"≥ {wishes.min_recovery:g}%",
        str(wishes.load.context), str(wishes.load.concurrency), style="dim",
    )  # fmt: skip
    return table


def _explain(console: Console, answer: Recommendation, best: Candidate, language: str) -> None:
    for candidate in answer.ranked:
        for key, lines in (("why", candidate.reasons), ("note", candidate.notes), ("missed", candidate.misses)):
            for line in lines:
                source = f" [{line.source}]" if line.source and key == "why" else ""
                console.print(f"{_say(key, language)} ({candidate.option.method}): {line.say(language)}{source}",
                              markup=False, soft_wrap=True)  # fmt: skip
    speed = best.speed
    basis = text(speed.basis, samples=speed.samples).say(language)
    if speed.basis == "predicted" and speed.error is not None:
        basis += text("off", error=100 * speed.error).say(language)
    console.print(f"{_say('speeds', language)}: {basis}; {_say('accuracies', language)}")


def _say(key: str, language: str) -> str:
    return text(key).say(language)
