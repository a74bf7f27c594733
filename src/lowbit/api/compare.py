"""Runs and artifacts side by side: rows for one table, sorted, with the Pareto fronts marked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.api.runs import read_run, record_file, run_file
from lowbit.core.errors import CheckpointError
from lowbit.evals.statistics import INDISTINGUISHABLE, pareto_front
from lowbit.report.tables import row


def compared(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One row for each artifact (with its own run, where there is one) or run file, and one for a base that runs have
    scores of; smallest KL divergence first. Raises CheckpointError or EvaluationError for what is neither."""
    rows = [_row(path) for path in paths]
    methods = [values["method"] for values in rows]
    for values in rows:
        if methods.count(values["method"]) > 1:
            values["method"] = f"{values['method']} ({Path(values['name']).name})"
    rows.sort(key=lambda values: (values["kl"] is None, values["kl"] or 0.0))
    base = _base_row(rows)
    if base is not None:
        rows.insert(0, base)
    _mark(rows, "pareto_memory", [_memory(values) for values in rows])
    _mark(rows, "pareto_speed", [None if not values["decode"] else -values["decode"] for values in rows])
    return rows


def load_run(path: Path) -> dict[str, Any]:
    """The run in a file, or of an artifact: its own evaluation, else only its record. Raises CheckpointError."""
    if path.suffix == ".json":
        return read_run(path)
    record = record_file(path)
    if not record.is_file():
        raise CheckpointError(
            f"{path} is no lowbit artifact: it has no {record.name}",
            hint="lowbit quantize makes one; or give a run's .json",
        )
    own = run_file(path)
    run: dict[str, Any] = {"artifact": str(path), "base": None, "runtime": None}
    if own.is_file():
        run = read_run(own)
    content = json.loads(record.read_text())
    if "text" not in run and content.get("verification"):
        run["text"] = {**content["verification"], "dataset": "verification, held out of calibration"}
    return {**run, "record": content, "cost": _cost(path, content)}


def _cost(path: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    if path.suffix == ".gguf":
        cost = record.get("run")
        return dict(cost) if cost else None
    file = path / "lowbit-run.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _row(path: Path) -> dict[str, Any]:
    run = load_run(path)
    record, text = run.get("record"), run.get("text") or {}
    values: dict[str, Any]
    if record:
        values = row(str(path), record, run.get("cost"), text)
    else:
        measured = ("perplexity", "perplexity_error", "kl", "kl_error", "top1", "base_perplexity")
        unknown = dict.fromkeys(("bits_per_weight", "mib", "compression", "seconds", "peak_mib"))
        values = {"name": run["artifact"], "method": Path(run["artifact"]).name, **unknown}
        values |= {key: text.get(key) for key in measured}
    speed, memory = run.get("speed") or {}, run.get("memory") or {}
    return {
        **values,
        "mib": values["mib"] or (memory["total"] / 2**20 if memory else None),
        "kl_p99": text.get("kl_p99"),
        "tasks": run.get("tasks") or {},
        "verdict": run.get("verdict") or "",
        "runtime": run.get("runtime"),
        "cache_mib": memory["cache"] / 2**20 if memory else None,
        "prefill": speed.get("prefill_tokens_per_second"),
        "decode": speed.get("decode_tokens_per_second"),
        "first_token": speed.get("time_to_first_token"),
        "peak_run_mib": speed["peak_memory"] / 2**20 if "peak_memory" in speed else None,
        "base": False,
        "base_bytes": record["base"]["bytes"] if record else None,
    }


def _base_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The unquantized model, from what the runs have of it; None when they have nothing, or its 16-bit copy is a row."""
    scored = next((values for values in rows if any("against" in task for task in values["tasks"].values())), None)
    if scored is None or any(_is_cast(values) for values in rows):
        return None
    tasks: dict[str, Any] = {}
    for values in rows:
        for name, task in values["tasks"].items():
            if "against" in task and name not in tasks:
                tasks[name] = {**{key: task[key] for key in ("name", "metric", "higher_is_better", "shots", "n")},
                               "score": task["base_score"], "error": _binary_error(task)}  # fmt: skip
    empty: dict[str, Any] = dict.fromkeys(scored)
    return {
        **empty,
        "name": "base",
        "method": "the model itself",
        "bits_per_weight": 16.0,
        "mib": scored["base_bytes"] / 2**20 if scored["base_bytes"] else None,
        "compression": 1.0,
        "perplexity": scored["base_perplexity"],
        "kl": 0.0,
        "top1": 1.0,
        "tasks": tasks,
        "verdict": "",
        "base": True,
    }


def _is_cast(values: dict[str, Any]) -> bool:
    return str(values["method"]).startswith("cast")


def _binary_error(task: dict[str, Any]) -> float | None:
    """Standard error of a share of right items; a perplexity's is not known from its score."""
    score, n = task["base_score"], task["n"]
    return None if "perplexity" in task["metric"] or n < 2 else float((score * (1 - score) / (n - 1)) ** 0.5)


def _memory(values: dict[str, Any]) -> float | None:
    return None if values["mib"] is None else float(values["mib"])


def merit(rows: Sequence[dict[str, Any]]) -> list[float | None]:
    """How good each row is: the mean of the tasks that all rows have; minus the KL divergence where they have none, or too
    few items to tell any row from the base: then the divergence is what tells them apart."""
    shared = set.intersection(*(set(values["tasks"]) for values in rows)) if rows else set()
    shares = [name for name in sorted(shared) if all(values["tasks"][name]["higher_is_better"] for values in rows)]
    verdicts = {task["against"]["verdict"] for values in rows for task in values["tasks"].values() if "against" in task}
    if shares and (verdicts - {INDISTINGUISHABLE} or not verdicts):
        return [sum(values["tasks"][name]["score"] for name in shares) / len(shares) for values in rows]
    return [None if values["kl"] is None else -values["kl"] for values in rows]


def _mark(rows: list[dict[str, Any]], name: str, costs: list[float | None]) -> None:
    merits = merit(rows)
    known = [
        i for i, (cost, good) in enumerate(zip(costs, merits, strict=True)) if cost is not None and good is not None
    ]
    front = pareto_front([(float(costs[i] or 0.0), float(merits[i] or 0.0)) for i in known])
    on = {i for i, marked in zip(known, front, strict=True) if marked}
    for number, values in enumerate(rows):
        values[name] = number in on if number in known else None
