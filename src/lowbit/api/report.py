"""Runs -> report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowbit import __version__
from lowbit.api.compare import compared, load_run, merit
from lowbit.core.errors import OutputError, RecipeError
from lowbit.report.page import LANGUAGES, Language, render


def write_report(paths: Sequence[Path], output: Path, *, lang: str = "en") -> None:
    """Write one self-contained page over artifacts and run files. Raises LowbitError subclasses."""
    chosen: dict[str, Language] = {"en": "en", "zh": "zh"}
    if lang not in chosen:
        raise RecipeError(f"--lang {lang!r} is no language of the report", hint=" or ".join(LANGUAGES))
    rows = compared(paths)
    methods = {values["name"]: str(values["method"]) for values in rows}
    runs = []
    for path in paths:
        run = load_run(path)
        key = str(path) if run.get("record") else str(run["artifact"])
        runs.append((methods.get(key, path.stem), run))
    order = [values["name"] for values in rows]
    runs.sort(key=lambda item: next((i for i, name in enumerate(order) if methods[name] == item[0]), len(order)))
    page = render(rows, runs, merit(rows), lang=chosen[lang], version=__version__)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}", hint="another -o") from error
