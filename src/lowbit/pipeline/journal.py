"""The journal: which blocks are done, so that a run that was cut off continues instead of starting over."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.core.errors import ResumeError
from lowbit.pipeline.writer import output_errors

_NAME = "journal.jsonl"


class Journal:
    """One line per finished block, after a first line with what the run depends on.

    inputs: name -> value of everything that decides the bytes (recipe, checkpoint, calibration tokens, versions).
    Raises ResumeError when an earlier run in this directory had other inputs, naming the difference.
    """

    def __init__(self, directory: Path, inputs: Mapping[str, Any]) -> None:
        self.file = directory / _NAME
        self.blocks: dict[int, dict[str, Any]] = {}
        lines = self._lines()
        if lines:
            self._compare(lines[0], inputs)
            self.blocks = {int(line["block"]): line for line in lines[1:]}
        else:
            self._append({"inputs": dict(inputs)}, mode="w")

    def done(self, index: int, report: Mapping[str, Any]) -> None:
        """Record a block whose tensors are safely on disk."""
        line = {"block": index, **report}
        self.blocks[index] = line
        self._append(line, mode="a")

    def remove(self) -> None:
        """Drop the journal of a finished artifact."""
        self.file.unlink(missing_ok=True)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        lines = []
        for line in self.file.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # the last line of a run that was killed as it wrote
                break
        self._append_end()
        return lines

    def _append_end(self) -> None:
        """Cut a torn last line off, so that the next one starts on its own."""
        content = self.file.read_bytes()
        keep = content.rfind(b"\n") + 1
        if keep != len(content):
            with self.file.open("r+b") as stream:
                stream.truncate(keep)

    def _append(self, line: Mapping[str, Any], mode: str) -> None:
        with output_errors(self.file), self.file.open(mode) as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _compare(self, first: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        before = first.get("inputs", {})
        now = json.loads(json.dumps(dict(inputs)))
        changed = [
            f"{name} (was {_short(before.get(name))}, now {_short(now.get(name))})"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ResumeError(
                f"{self.file.parent} holds an unfinished run that differs in {'; '.join(changed)}",
                hint="run it with the same settings to continue it, or add --restart to drop it",
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
