"""The table of `lowbit compare` and `sweep`: columns for what was measured, in 80 columns, Markdown or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowbit.report.tables import is_perplexity

Row = Mapping[str, Any]
MARKS = {"indistinguishable": "=", "small loss": "▾", "significant loss": "▼", "broken": "✗", "better": "▴"}
_VERDICTS = "against the base, paired: " + ", ".join(f"{mark} {verdict}" for verdict, mark in MARKS.items())


def task_names(rows: Sequence[Row]) -> list[str]:
    """Tasks of all rows, in order."""
    return list(dict.fromkeys(name for values in rows for name in values["tasks"]))


def score_cell(task: Mapping[str, Any] | None, *, error: bool = True) -> str:
    """ "44.8±0.4▾": percent, standard error, verdict mark."""
    if task is None:
        return "-"
    scale = 1 if is_perplexity(task) else 100
    spread = f"±{scale * task['error']:.1f}" if error and task["error"] is not None else ""
    verdict = task.get("against", {}).get("verdict")
    return f"{scale * task['score']:.1f}{spread}{MARKS[verdict] if verdict else ''}"


def _number(layout: str, scale: float = 1.0) -> Callable[[Any], str]:
    return lambda value: "-" if value is None else format(scale * value, layout)


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Heading and cell of every column that some row has a value for."""
    fixed: list[tuple[str, str, Callable[[Any], str]]] = [
        ("bits", "bits_per_weight", _number(".2f")),
        ("MiB", "mib", _number(".0f")),
        ("KL", "kl", _number(".4f")),
        ("top-1", "top1", _number(".1f", 100)),
    ]
    if not task_names(rows):
        fixed.append(("perplexity", "perplexity", _number(".2f")))
    columns: list[tuple[str, Callable[[Row], str]]] = [("method", _method)]
    for heading, key, show in fixed:
        if any(values[key] is not None for values in rows):
            columns.append((heading, _value(key, show)))
    spread = len(task_names(rows)) <= 2  # as many as 80 columns hold with their errors
    for name in task_names(rows):
        columns.append((_short(name), _score(name, error=spread)))
    if any(values["decode"] is not None for values in rows):
        columns.append(("tok/s", _value("decode", _number(".1f"))))
    return columns


def _value(key: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda values: show(values[key])


def _score(name: str, *, error: bool) -> Callable[[Row], str]:
    return lambda values: score_cell(values["tasks"].get(name), error=error)


def _method(values: Row) -> str:
    front = ("◆" if values["pareto_memory"] else "") + ("◇" if values["pareto_speed"] else "")
    return f"{values['method']} {front}".strip()


def _short(name: str) -> str:
    return {
        "arc_challenge": "ARC-C",
        "arc_easy": "ARC-E",
        "hellaswag": "HellaSwag",
        "mmlu": "MMLU",
        "gsm8k": "GSM8K",
    }.get(name, name.removeprefix("mmlu_"))


def legend(rows: Sequence[Row]) -> str:
    """What the marks in these rows' table mean; "" where it has none."""
    meanings = [
        (bool(task_names(rows)), _VERDICTS),
        (any(values["pareto_memory"] for values in rows), "◆ nothing smaller is as good"),
        (any(values["pareto_speed"] for values in rows), "◇ nothing faster is as good"),
    ]
    return "; ".join(meaning for has, meaning in meanings if has)


def rich_table(rows: Sequence[Row], title: str) -> Any:
    """For a terminal."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False,
        collapse_padding=True, caption=legend(rows), caption_justify="left",
    )  # fmt: skip
    columns = _columns(rows)
    for number, (heading, _) in enumerate(columns):
        if number == 0:
            table.add_column(heading, overflow="fold", min_width=14)
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for values in rows:
        style = "bold" if values["pareto_memory"] else "dim" if values["base"] else ""
        table.add_row(*(cell(values) for _, cell in columns), style=style)
    return table


def print_table(rows: Sequence[Row], title: str) -> None:
    """On a terminal, in its width; elsewhere in 80 columns."""
    from rich.console import Console

    Console(width=None if Console().is_terminal else 80).print(rich_table(rows, title))


def as_markdown(rows: Sequence[Row]) -> str:
    """For a page: the columns of the terminal and perplexity, size, time."""
    headings = ["method", "bits/weight", "MiB", "KL (nats)", "top-1", "perplexity", *map(_short, task_names(rows))]
    headings += ["decode tok/s", "first token s", "verdict", "Pareto"]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for values in rows:
        cells = [
            str(values["method"]),
            _number(".2f")(values["bits_per_weight"]),
            _number(".1f")(values["mib"]),
            _number(".4f")(values["kl"]),
            _number(".1%")(values["top1"]),
            _number(".2f")(values["perplexity"]),
            *(score_cell(values["tasks"].get(name)) for name in task_names(rows)),
            _number(".1f")(values["decode"]),
            _number(".2f")(values["first_token"]),
            values["verdict"] or "-",
            ", ".join(name for name, key in (("memory", "pareto_memory"), ("speed", "pareto_speed")) if values[key])
            or "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_csv(rows: Sequence[Row]) -> str:
    """For a spreadsheet: every plain value, and of every task its score, error, difference, interval, p and verdict."""
    plain = [key for key in rows[0] if key not in ("tasks", "base", "base_bytes")]
    names = task_names(rows)
    of_task = ("score", "error", "n", "difference", "low", "high", "p_value", "recovery", "flips", "verdict")
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow([*plain, *(f"{name}_{key}" for name in names for key in of_task)])
    for values in rows:
        cells = [values[key] for key in plain]
        for name in names:
            task = values["tasks"].get(name, {})
            cells += [{**task, **task.get("against", {})}.get(key) for key in of_task]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return stream.getvalue()
