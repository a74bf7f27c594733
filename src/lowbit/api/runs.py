"""Runs as files: what `lowbit evaluate` writes, and `compare` and `report` read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lowbit.core.errors import EvaluationError, OutputError
from lowbit.evals.statistics import worst_verdict


def record_file(artifact: Path) -> Path:
    """Where the record of an artifact lies: in its directory, or beside a .gguf file."""
    return artifact.with_suffix(".lowbit.json") if artifact.suffix == ".gguf" else artifact / "lowbit.json"


def run_file(artifact: Path) -> Path:
    """Where an artifact's own run is kept, beside its record."""
    return artifact.with_suffix(".lowbit-eval.json") if artifact.suffix == ".gguf" else artifact / "lowbit-eval.json"


def write_run(run: dict[str, Any], file: Path) -> None:
    """Write a run, whole or not at all. Raises OutputError."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, file)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}", hint="another --output") from error


def merged(before: dict[str, Any] | None, run: dict[str, Any]) -> dict[str, Any]:
    """A run with what an earlier one of the same artifact measured besides: tasks, text, speed."""
    if before is None or before.get("artifact") != run["artifact"] or before.get("base") != run["base"]:
        return run
    same = before.get("runtime") == run["runtime"]
    kept = [name for name in ("text", "speed", "lm_eval") if name in before and (same or name == "text")]
    whole: dict[str, Any] = {str(name): before[name] for name in kept}
    whole.update(run)
    tasks: dict[str, Any] = dict(before.get("tasks", {})) if same else {}
    tasks |= run.get("tasks", {})
    if tasks:
        whole["tasks"] = tasks
        whole["verdict"] = worst_verdict([task["against"]["verdict"] for task in tasks.values() if "against" in task])
    return whole


def read_run(file: Path) -> dict[str, Any]:
    """A run from a file. Raises EvaluationError."""
    try:
        run = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{file} cannot be read as a run: {error}", hint="lowbit evaluate -o FILE writes one"
        ) from error
    if not isinstance(run, dict) or "artifact" not in run:
        raise EvaluationError(f"{file} is no run of lowbit evaluate")
    return run
