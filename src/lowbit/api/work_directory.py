"""Where an artifact grows until it is finished."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowbit.core.errors import OutputError
from lowbit.pipeline.writer import output_errors


def work_directory(output: Path) -> Path:
    """A hidden directory beside the final place, on the same disk."""
    return output.absolute().with_name(f".{output.absolute().name}.unfinished")


def check_place(output: Path, work: Path, *, restart: bool) -> None:
    """Raises OutputError when the final place is taken. `restart` drops an unfinished run."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists already", hint="choose another -o, or remove it first")
    if restart and work.exists():
        with output_errors(work):
            shutil.rmtree(work)
