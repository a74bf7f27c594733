"""report.html: one file that holds its data, its charts' library and its style, and asks no network for anything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any, Literal

import yaml

from lowbit.core.errors import OutputError
from lowbit.report.compare_table import score_cell, task_names
from lowbit.report.figures import Point, heat_map, kl_lines, scatter
from lowbit.report.tables import is_perplexity, score_text

Language = Literal["en", "zh"]
LANGUAGES = ("en", "zh")
# a divergence below this is float32's own rounding: an unquantized copy has no distribution to show
_NOTHING = 1e-6


def render(
    rows: Sequence[Mapping[str, Any]],
    runs: Sequence[tuple[str, Mapping[str, Any]]],
    merits: Sequence[float | None],
    *,
    lang: Language,
    version: str,
) -> str:
    """The page. rows: of the comparison. runs: name and run of each artifact. merits: of each row: the mean score of tasks,
    or minus the KL divergence. Raises OutputError when plotly or jinja2 are missing."""
    try:
        from jinja2 import Environment
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise OutputError(
            f"a report needs {error.name}, which is not installed", hint="pip install 'lowbit[report]'"
        ) from error
    files = resources.files("lowbit.report.html")
    texts: dict[str, Any] = yaml.safe_load(files.joinpath("texts.yaml").read_text(encoding="utf-8"))[lang]
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["visible"] = _visible
    template = environment.from_string(files.joinpath("page.html.j2").read_text(encoding="utf-8"))
    scatters = _scatters(rows, merits, texts)
    histograms = [
        (number, name, run["text"]["histogram"])
        for number, (name, run) in enumerate(runs)
        if (run.get("text") or {}).get("histogram", {}).get("counts") and run["text"]["kl"] > _NOTHING
    ]
    heat = [heat_map((run.get("record") or {}).get("layers", {}), texts["heat_x"]) for _, run in runs]
    data = {
        "scatters": {part["id"]: part.pop("figure") for part in scatters},
        "heat": heat,
        "kl": kl_lines(histograms, texts["kl_x"], texts["kl_y"]),
    }
    return template.render(
        t=texts,
        lang=lang,
        version=version,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        base=_base_name(runs),
        headings=_headings(rows, texts),
        table=[_table_row(values, rows, texts) for values in rows],
        scatters=scatters,
        chosen=next((number for number, figure in enumerate(heat) if figure), 0),
        has_histogram=bool(histograms),
        runs=[_run_part(name, run, texts) for name, run in runs],
        data=data,
        css=Markup(files.joinpath("page.css").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        script=Markup(files.joinpath("page.js").read_text(encoding="utf-8")),
    )


def _visible(text: str) -> str:
    """Line ends and other invisible characters that a reader should see."""
    return text.replace("\n", "⏎").replace("\t", "⇥")


def _base_name(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    names = [str((run.get("record") or {}).get("base", {}).get("name") or run.get("base") or "") for _, run in runs]
    return next((name.rstrip("/").rpartition("/")[2] for name in names if name), "")


_PLAIN: tuple[tuple[str, str, str, float], ...] = (
    ("bits", "bits_per_weight", ".2f", 1),
    ("mib", "mib", ".1f", 1),
    ("kl", "kl", ".4f", 1),
    ("p99", "kl_p99", ".3f", 1),
    ("top1", "top1", ".1f", 100),
    ("ppl", "perplexity", ".2f", 1),
)
_SPEED: tuple[tuple[str, str, str, float], ...] = (
    ("decode", "decode", ".1f", 1),
    ("first", "first_token", ".2f", 1),
    ("peak", "peak_run_mib", ".0f", 1),
)


def _measured(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str, float]]) -> list[Any]:
    return [column for column in columns if any(values[column[1]] is not None for values in rows)]


def _headings(rows: Sequence[Mapping[str, Any]], texts: Mapping[str, Any]) -> list[str]:
    names = texts["columns"]
    plain = [names[column[0]] for column in _measured(rows, _PLAIN)]
    speed = [names[column[0]] for column in _measured(rows, _SPEED)]
    return [names["method"], *plain, *task_names(rows), *speed, names["verdict"]]


def _table_row(
    values: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], texts: Mapping[str, Any]
) -> dict[str, Any]:
    def shown(columns: Sequence[tuple[str, str, str, float]]) -> list[str]:
        cells = [(values[key], layout, scale) for _, key, layout, scale in _measured(rows, columns)]
        return ["-" if value is None else format(value * scale, layout) for value, layout, scale in cells]

    verdict = values["verdict"] or ""
    return {
        "method": values["method"],
        "front": bool(values["pareto_memory"] or values["pareto_speed"]),
        "cells": [*shown(_PLAIN), *(score_cell(values["tasks"].get(n)) for n in task_names(rows)), *shown(_SPEED)],
        "verdict": texts["verdicts"].get(verdict, "-"),
        "verdict_class": verdict.partition(" ")[0],
    }


def _scatters(
    rows: Sequence[Mapping[str, Any]], merits: Sequence[float | None], texts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    by_tasks = any(merit is not None and merit > 0 for merit in merits)
    y = texts["merit_tasks" if by_tasks else "merit_kl"]
    parts = []
    for id_, key, front, axis in (
        ("size", "mib", "pareto_memory", "size_axis"),
        ("speed", "decode", "pareto_speed", "speed_axis"),
    ):
        points = [
            Point(
                number,
                str(values["method"]),
                values[key],
                100 * merit if by_tasks else -merit,
                bool(values[front]),
                error,
            )
            for number, (values, merit, error) in enumerate(
                zip(rows, merits, _errors(rows, by_tasks=by_tasks), strict=True)
            )
            if merit is not None and values[key] is not None and (by_tasks or merit < 0)
        ]
        figure = scatter(points, texts[axis], y, texts["front"], lower_is_better=not by_tasks) if points else None
        spoken = "; ".join(f"{point.name} {point.x:.0f}, {point.y:.4g}" for point in points)
        parts.append({
            "id": id_, "title": texts[f"{id_}_title"], "x": texts[axis], "y": y, "spoken": spoken, "figure": figure,
            "points": [asdict(point) for point in points],
        })  # fmt: skip
    return parts


def _errors(rows: Sequence[Mapping[str, Any]], *, by_tasks: bool) -> list[float | None]:
    """Standard error of a row's mean over tasks, in percent."""
    if not by_tasks:
        return [None] * len(rows)
    found: list[float | None] = []
    for values in rows:
        errors = [t["error"] for t in values["tasks"].values() if t["higher_is_better"] and t["error"] is not None]
        found.append(100 * sum(error**2 for error in errors) ** 0.5 / len(errors) if errors else None)
    return found


def _run_part(name: str, run: Mapping[str, Any], texts: Mapping[str, Any]) -> dict[str, Any]:
    record, text = run.get("record") or {}, run.get("text") or {}
    words = texts["provenance"]
    versions = record.get("versions", {})
    known = {
        "base": record.get("base", {}).get("name") or run.get("base"),
        "identity": record.get("base", {}).get("identity"),
        "lowbit": record.get("lowbit"),
        "torch": versions.get("torch"),
        "compute": versions.get("compute"),
        "calibration": (record.get("calibration") or {}).get("windows_sha256"),
        "dataset": text.get("dataset"),
        "windows": f"{text['windows']} x {text['context']}" if "windows" in text else None,
        "runtime": run.get("runtime") if run.get("tasks") else None,
        "lm_eval": run.get("lm_eval"),
        "states": text.get("base_states"),
        "finished": run.get("finished"),
    }
    return {
        "name": name,
        "worst": (text.get("worst") or [])[:25],
        "tasks": [_task_cells(task, texts) for task in (run.get("tasks") or {}).values()],
        "recipe": yaml.safe_dump(record["recipe"], sort_keys=False).strip() if "recipe" in record else "",
        "provenance": [(words[key], value) for key, value in known.items() if value],
    }


def _task_cells(task: Mapping[str, Any], texts: Mapping[str, Any]) -> list[str]:
    title = f"{task['name']} ({task['metric']}, {task['shots']}-shot)"
    against = task.get("against")
    if against is None:
        return [title, str(task["n"]), score_text(task), *["-"] * 6]
    scale = 1 if is_perplexity(task) else 100
    return [
        title,
        str(task["n"]),
        score_text(task),
        f"{scale * task['base_score']:.1f}",
        f"{scale * against['difference']:+.1f} [{scale * against['low']:+.1f}, {scale * against['high']:+.1f}]",
        f"{against['p_value']:.2g}",
        "-" if is_perplexity(task) else f"{100 * against['flips']:.1f}%",
        f"{against['recovery']:.1f}%",
        texts["verdicts"].get(against["verdict"], against["verdict"]),
    ]
