"""Text for calibration and measurement: where it comes from, and how it becomes windows of tokens.

A dataset is named by
    pydoc                       the English reference text in Python's own standard library: real text, no download
    c4 wikitext pileval ultrachat   the usual sets, from the hub
    FILE.txt .jsonl .csv .parquet   a local file; a column may follow a colon: notes.jsonl:body
    ORG/NAME[:split[:column]]   any hub dataset
    self                        text sampled from the model itself (lowbit.pipeline.self_sampling)
and several joined by "+" share the windows equally: pydoc+notes.txt
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.core.errors import CalibrationError, did_you_mean


class _HubText(NamedTuple):
    repo: str
    config: str | None
    split: str
    column: str
    files: str | None = None


HUB_SETS = {
    "c4": _HubText("allenai/c4", None, "train", "text", "en/c4-train.00000-of-01024.json.gz"),
    "wikitext": _HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "pileval": _HubText("mit-han-lab/pile-val-backup", None, "validation", "text"),
    "ultrachat": _HubText("HuggingFaceH4/ultrachat_200k", None, "train_sft", "messages"),
}
# tokens that windows are drawn from, at most: hub sets are endless. The same for every `count`, so that the first windows
# of a longer draw are those of a shorter one
_POOL = 2**22
_LOCAL = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")
_DEFAULT_COLUMNS = ("text", "content", "messages", "prompt", "query", "ctx", "question")


def token_windows(dataset: str, tokenizer: Any, count: int, length: int, seed: int = 0) -> Tensor:
    """[count, length] int64 token windows, drawn without overlap from all over the text by a seeded shuffle.

    Documents are packed one after the other. Raises CalibrationError when the text gives fewer windows.
    """
    parts = dataset.split("+")
    shares = [count // len(parts) + (i < count % len(parts)) for i in range(len(parts))]
    drawn = [_draw(part, tokenizer, share, length, seed) for part, share in zip(parts, shares, strict=True) if share]
    return torch.cat(drawn)


def first_windows(dataset: str, tokenizer: Any, count: int, length: int) -> Tensor:
    """[count, length] int64: the first windows of the text, in order; for measuring. Raises CalibrationError."""
    ids = _token_stream(dataset, tokenizer, count * length)
    return _windows_of(dataset, ids, count, length)[:count]


def windows_digest(windows: Tensor) -> str:
    """A hash of the token windows, for the recipe record."""
    return hashlib.sha256(windows.to(torch.int64).numpy().tobytes()).hexdigest()


def _draw(dataset: str, tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    windows = _windows_of(dataset, _token_stream(dataset, tokenizer, max(_POOL, count * length)), count, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def _windows_of(dataset: str, ids: list[int], count: int, length: int) -> Tensor:
    whole = len(ids) // length
    if whole < count:
        raise CalibrationError(
            f"{dataset} holds {len(ids)} tokens, which is {whole} windows of {length}; {count} were asked for",
            hint=f"--num-samples {whole} fits, or give a shorter --seq-len or more text (--dataset a.txt+b.txt)",
        )
    return torch.tensor(ids[: whole * length], dtype=torch.long).view(whole, length)


def _token_stream(dataset: str, tokenizer: Any, enough: int) -> list[int]:
    ids: list[int] = []
    for document in documents(dataset, tokenizer):
        ids.extend(tokenizer(document).input_ids)
        if len(ids) >= enough:
            break
    return ids


def documents(dataset: str, tokenizer: Any) -> Iterator[str]:
    """The texts of a dataset; chat messages go through the tokenizer's chat template. Raises CalibrationError."""
    if dataset == "pydoc":
        yield _pydoc()
        return
    name, _, column = dataset.partition(":")
    path = Path(name)
    if path.suffix in _LOCAL or path.exists():
        rows = _local_rows(path)
    else:
        rows, column = _hub_rows(dataset)
    for number, row in enumerate(rows):
        yield _text_of(row, column, tokenizer, f"{dataset}, row {number + 1}")


def _pydoc() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CalibrationError(
            "this Python has no pydoc_data in its standard library", hint="give --dataset a local text file"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def _local_rows(path: Path) -> Iterable[Any]:
    try:
        if path.suffix in (".jsonl", ".json"):
            return _json_rows(path)
        if path.suffix == ".csv":
            with path.open(newline="") as stream:
                return list(csv.DictReader(stream))
        if path.suffix == ".parquet":
            return _parquet_rows(path)
        return [path.read_text()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{path} cannot be read: {error}", hint="give --dataset a readable text file") from error


def _json_rows(path: Path) -> list[Any]:
    rows = []
    # not splitlines(): JSON strings may hold U+2028, which it takes for the end of a line
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise CalibrationError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def _parquet_rows(path: Path) -> list[Any]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(f"{path} needs pyarrow to be read", hint="pip install 'lowbit[hub]'") from error
    return list(pyarrow.parquet.read_table(path).to_pylist())


def _hub_rows(dataset: str) -> tuple[Iterable[Any], str]:
    name, *rest = dataset.split(":")
    source = HUB_SETS.get(name)
    if source is None:
        if "/" not in name:
            known = ["pydoc", "self", *HUB_SETS]
            raise CalibrationError(
                f"dataset {name!r} is unknown{did_you_mean(name, known)}",
                hint=f"one of {', '.join(known)}, a local {' '.join(_LOCAL)} file, or a hub id org/name:split:column",
            )
        source = _HubText(name, None, rest[0] if rest else "train", rest[1] if len(rest) > 1 else "")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"{name} comes from the hub", hint="pip install 'lowbit[hub]', or --dataset pydoc"
        ) from error
    from huggingface_hub.errors import HTTPError

    try:
        files = {"data_files": source.files} if source.files else {}
        rows = load_dataset(source.repo, source.config, split=source.split, streaming=True, **files)
        return rows, source.column
    except (OSError, ValueError, HTTPError, RuntimeError) as error:
        cause = (str(error).strip().splitlines() or ["no connection"])[0][:160]
        raise CalibrationError(
            f"dataset {source.repo} could not be read from the hub: {cause}",
            hint="--dataset pydoc needs no network; or give a local text file",
        ) from error


def _text_of(row: Any, column: str, tokenizer: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise CalibrationError(f"{where} is neither text nor an object")
    found = column or next((name for name in _DEFAULT_COLUMNS if name in row), "")
    if found not in row:
        raise CalibrationError(
            f"{where} has no column {column!r}" if column else f"{where} has none of {', '.join(_DEFAULT_COLUMNS)}",
            hint=f"name one after a colon; it has {', '.join(map(str, row))}",
        )
    value = row[found]
    if isinstance(value, list):
        return str(tokenizer.apply_chat_template(value, tokenize=False))
    return str(value)
