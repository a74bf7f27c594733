"""Task data small enough for a tiny random model."""

from __future__ import annotations

import json
import random
from pathlib import Path


def write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_task_data(folder: Path) -> Path:
    """hellaswag, two subjects of mmlu, and a little wikitext; one text holds a line separator that is no line's end."""
    rng = random.Random(0)
    words = [f"{start}{end}" for start in ("name", "value", "list", "item") for end in ("", "s", " of", " is")]

    def text(count: int) -> str:
        return " ".join(rng.choice(words) for _ in range(count))

    swag = [
        {"ctx": f"Doing: {text(9)}\u2028he", "endings": [text(rng.randint(2, 6)) for _ in range(4)], "label": i % 4}
        for i in range(24)
    ]
    write_rows(folder / "hellaswag.validation.jsonl", swag)
    for split, count in (("dev", 5), ("test", 9)):
        rows: list[dict[str, object]] = [
            {"subject": subject, "question": f"{text(5)} ?", "choices": [text(2) for _ in range(4)], "answer": i % 4}
            for subject in ("anatomy", "virology")
            for i in range(count)
        ]
        write_rows(folder / f"mmlu.{split}.jsonl", rows)
    (folder / "wikitext-2.test.txt").write_text(
        f" = One = \n\n {text(40)} .\n = = Part = = \n {text(9)}\n = Two = \n {text(30)}\n"
    )
    return folder
