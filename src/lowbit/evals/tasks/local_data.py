"""Task data from a local folder instead of the hub.

TASK.SPLIT.jsonl, one JSON object a line, with the columns of the hub's data set (hellaswag.validation.jsonl,
arc_challenge.test.jsonl, gsm8k.train.jsonl). Besides:
    mmlu.dev.jsonl, mmlu.test.jsonl    all subjects in one file: {"subject", "question", "choices" [4], "answer"}
    hellaswag.validation.jsonl         {"ctx", "endings" [4], "label"} will do, where "ctx" already begins with the activity
    wikitext-2.SPLIT.txt               the plain text, divided at its headings of articles
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowbit.core.errors import EvaluationError

_MMLU = "mmlu_"
_SPLITS = ("train", "validation", "valid", "dev", "test")
_ARTICLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)
Row = dict[str, Any]


class LocalData:
    """A folder of task data; every file is read once. Raises EvaluationError for a folder that is not there."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise EvaluationError(f"{folder} is no folder of task data", hint="--data DIR with TASK.SPLIT.jsonl files")
        self.folder = folder
        self._rows: dict[Path, list[Row]] = {}

    def splits(self, task: str) -> dict[str, list[Row]]:
        """Split -> rows of a leaf task such as "hellaswag" or "mmlu_anatomy". Raises EvaluationError."""
        if task == "wikitext":
            return self._wikitext()
        subject = task.removeprefix(_MMLU) if task.startswith(_MMLU) else None
        stem = "mmlu" if subject is not None and not self._files(task) else task
        files = self._files(stem)
        if not files:
            raise EvaluationError(
                f"{self.folder} has no data for {task}", hint=f"it needs {stem}.SPLIT.jsonl, SPLIT one of train, "
                "validation, dev, test; without --data the task's data come from the hub"
            )  # fmt: skip
        splits = {split: self._read(file, stem) for split, file in files.items()}
        if stem == "mmlu" and subject is not None:
            splits = {name: [row for row in rows if row["subject"] == subject] for name, rows in splits.items()}
        if not any(splits.values()):
            raise EvaluationError(f"{self.folder} has no items of {task}", hint="leave the task out, or add its rows")
        return {name: rows for name, rows in splits.items() if rows}

    def digest(self, task: str) -> str:
        """A hash of a leaf task's rows."""
        text = json.dumps(self.splits(task), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def _files(self, stem: str) -> dict[str, Path]:
        found = {split: self.folder / f"{stem}.{split}.jsonl" for split in _SPLITS}
        return {split: file for split, file in found.items() if file.is_file()}

    def _read(self, file: Path, stem: str) -> list[Row]:
        if file not in self._rows:
            self._rows[file] = _rows_of(file, _CHECKS.get(stem, _is_object))
        return self._rows[file]

    def _wikitext(self) -> dict[str, list[Row]]:
        texts = {split: self.folder / f"wikitext-2.{split}.txt" for split in ("train", "valid", "test")}
        splits = {split: _articles(file) for split, file in texts.items() if file.is_file()}
        if "test" not in splits:
            raise EvaluationError(f"{self.folder} has no data for wikitext", hint="it needs wikitext-2.test.txt")
        return {"validation" if split == "valid" else split: rows for split, rows in splits.items()}


def _rows_of(file: Path, check: Callable[[Row], str | None]) -> list[Row]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # texts may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvaluationError(
                f"{file}, line {number} is not JSON: {error}", hint="mend or remove the line; finished tasks are kept"
            ) from error
        problem = check(row) if isinstance(row, dict) else "is no JSON object"
        if problem:
            raise EvaluationError(f"{file}, line {number} {problem}", hint="mend or remove the line")
        rows.append(row)
    return rows


def _is_object(row: Mapping[str, Any]) -> str | None:
    return None if row else "is an empty object"


def _choice_row(row: Mapping[str, Any], text: str, choices: str, answer: str) -> str | None:
    """What is wrong with a multiple-choice item, or None."""
    if text and not isinstance(row.get(text), str):
        return f"has no text {text!r}"
    options, right = row.get(choices), row.get(answer)
    if not isinstance(options, list) or not options or not all(isinstance(option, str) for option in options):
        return f"has no list of texts {choices!r}"
    if isinstance(right, bool) or not str(right).isdigit() or int(str(right)) >= len(options):
        return f"has {answer!r} {right!r}, which is none of its {len(options)} {choices}"
    return None


def _mmlu_row(row: Mapping[str, Any]) -> str | None:
    if not isinstance(row.get("subject"), str):
        return "has no text 'subject'"
    problem = _choice_row(row, "question", "choices", "answer")
    if problem is None and len(row["choices"]) != 4:
        return f"has {len(row['choices'])} choices, not 4"
    return problem


def _hellaswag_row(row: Mapping[str, Any]) -> str | None:
    return _choice_row(row, "" if "ctx_a" in row else "ctx", "endings", "label")


_CHECKS: dict[str, Callable[[Row], str | None]] = {"mmlu": _mmlu_row, "hellaswag": _hellaswag_row}


def _articles(file: Path) -> list[Row]:
    """WikiText's articles, as EleutherAI/wikitext_document_level has them."""
    text = file.read_text(encoding="utf-8")
    starts = [match.start() for match in _ARTICLE.finditer(text)] or [0]
    return [{"page": text[start:stop]} for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]
