"""What was measured on this machine before: one JSON object a line, in bench.jsonl of the user's data directory.

Whoever measures a server appends a `BenchRecord`; predictions are corrected by them and say how far off they were.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class BenchRecord:
    """One measurement of one server.

    model_id: the base model as it was named. artifact_bytes: of its weight files. scheme: preset or GGUF type. hardware: the
    id that `lowbit recommend --hardware auto` gives. decode_tokens_per_s: of one request while `concurrency` run.
    prefill_tokens_per_s: prompt tokens of all. context: tokens of prompt and answer. date: ISO 8601. lowbit: version.
    """

    model_id: str
    artifact_bytes: int
    scheme: str
    runtime: str
    hardware: str
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    context: int
    concurrency: int
    date: str
    lowbit: str


def default_file() -> Path:
    """`$XDG_DATA_HOME/lowbit/bench.jsonl`, by default in ~/.local/share; a relative XDG_DATA_HOME is ignored."""
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "lowbit" / "bench.jsonl"


def append_record(record: BenchRecord, file: Path | None = None) -> Path:
    """Add a measurement; returns the file. A line is written at once, so that two writers do not mix theirs."""
    file = file or default_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
    return file


def read_records(file: Path | None = None) -> list[BenchRecord]:
    """All measurements; lines that are no such record (of another version, cut off) are left out."""
    file = file or default_file()
    if not file.is_file():
        return []
    names = {field.name for field in fields(BenchRecord)}
    found = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and names <= content.keys():
            found.append(BenchRecord(**{name: content[name] for name in names}))
    return found
