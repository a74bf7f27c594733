"""The comparison table: one row an artifact, for a terminal, Markdown or a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEADINGS = ("method", "bits/weight", "MiB", "compression", "perplexity", "KL (nats)", "top-1", "seconds", "peak MiB")


def row(
    name: str, record: Mapping[str, Any], cost: Mapping[str, Any] | None, measured: Mapping[str, Any] | None
) -> dict[str, Any]:
    """One row as plain data, from an artifact's lowbit.json, its cost and a measurement (its own verification, mostly)."""
    return {
        "name": name,
        "method": method_name(record),
        "bits_per_weight": record["bits_per_weight"],
        "mib": record["bytes"] / 2**20,
        "compression": record["base"]["bytes"] / record["bytes"],
        **{
            key: (measured or {}).get(key)
            for key in ("perplexity", "perplexity_error", "kl", "kl_error", "top1", "base_perplexity")
        },
        "seconds": cost.get("seconds") if cost else None,
        "peak_mib": max(cost["peak_memory_mib"].values()) if cost else None,
    }


def method_name(record: Mapping[str, Any]) -> str:
    """ "gptq 4-bit g64", "awq+rtn 4-bit g128 asym", "nf4 g64", "cast float16": the recipe's method and the numbers of most
    layers; numbers that are no integers have a name of their own."""
    recipe = record["recipe"]
    if recipe["format"] == "gguf":
        return str(recipe["method"])
    weights = [layer["scheme"]["weights"] for layer in record["layers"].values()]
    if not weights:
        return f"{recipe['method']} {recipe['dtype']}".removesuffix(" auto")
    usual = max(weights, key=weights.count)
    grouping = f"g{usual['group_size']}" if usual["group_size"] else usual["granularity"]
    kind = usual.get("kind", "int")
    if kind != "int":
        name = f"fp{usual['bits']}" if kind == "float" else kind
        return "+".join([*recipe.get("transforms", ()), f"{name} {grouping}"])
    method = "+".join([*recipe.get("transforms", ()), recipe["method"]])
    return f"{method} {usual['bits']}-bit {grouping}" + ("" if usual["symmetric"] else " asym")


def cells(values: Mapping[str, Any]) -> list[str]:
    """A row as text, in the order of HEADINGS; what was not measured is a dash."""

    def with_error(value: str, error: str, digits: int) -> str:
        if values[value] is None:
            return "-"
        spread = "" if values[error] is None else f" ± {values[error]:.{digits}f}"
        return f"{values[value]:.{digits}f}{spread}"

    def plain(name: str, layout: str) -> str:
        return "-" if values[name] is None else format(values[name], layout)

    return [
        values["method"],
        plain("bits_per_weight", ".2f"),
        plain("mib", ".1f"),
        plain("compression", ".2f") + "x",
        with_error("perplexity", "perplexity_error", 2),
        with_error("kl", "kl_error", 4),
        plain("top1", ".1%"),
        plain("seconds", ".0f"),
        plain("peak_mib", ".0f"),
    ]


def task_table(tasks: Mapping[str, Mapping[str, Any]], title: str) -> Any:
    """A rich table of a run's tasks, 80 columns wide: score, base, difference with its 95% interval, verdict."""
    from rich import box
    from rich.table import Table

    compared = any("against" in task for task in tasks.values())
    table = Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("task", overflow="fold", min_width=9)
    for heading in ("items", "score", *(("base", "difference, 95%") if compared else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    if compared:
        table.add_column("verdict", no_wrap=True)
    for name, task in tasks.items():
        cells = [name, str(task["n"]), score_text(task)]
        if "against" in task:
            against = task["against"]
            scale, digits = (1, 1) if is_perplexity(task) else (100, 1)
            low, high = (f"{against[end] * scale:+.{digits}f}" for end in ("low", "high"))
            cells += [
                f"{task['base_score'] * scale:.{digits}f}",
                f"{against['difference'] * scale:+.{digits}f} [{low}, {high}]",
                against["verdict"],
            ]
        table.add_row(*cells)
    return table


def task_notes(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the table has no room for: metric and shots, and what share of the answers changed."""
    lines = []
    for name, task in tasks.items():
        line = f"{name}: {task['metric']}, {task['shots']}-shot"
        if "against" in task:
            against = task["against"]
            line += f"; recovery {against['recovery']:.1f}%, p {against['p_value']:.2g}"
            if not is_perplexity(task):
                line += f"; {against['flips']:.1%} of the items changed sides"
            if task.get("changed_answers") is not None:
                line += f", {task['changed_answers']:.1%} of the answers changed"
        lines.append(line)
    return lines


def is_perplexity(task: Mapping[str, Any]) -> bool:
    """Whether a task's score is no share of items."""
    return "perplexity" in task["metric"]


def score_text(task: Mapping[str, Any]) -> str:
    """ "45.3 ± 0.4", in percent unless it is a perplexity."""
    if is_perplexity(task):
        return f"{task['score']:.1f} ± {task['error']:.1f}"
    return f"{100 * task['score']:.1f} ± {100 * task['error']:.1f}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    return "\n".join(lines + ["| " + " | ".join(cells(values)) + " |" for values in rows])


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """The table on a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for values in rows:
        table.add_row(*cells(values))
    Console(width=None if Console().is_terminal else 140).print(table)
