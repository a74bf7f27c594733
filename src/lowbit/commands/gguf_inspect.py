"""lowbit inspect MODEL.gguf."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lowbit.core.errors import CheckpointError

_LONG = 100


def inspect_gguf(file: Path, *, layers: bool, check: bool, as_json: bool) -> None:
    """Print types by tensor, bits per weight, metadata, chat template, and the record beside the file if there is one.

    Raises CheckpointError for a damaged file, and with `check` for one that differs from its recorded checksum.
    """
    from lowbit.api.gguf_record import changed_files, read_gguf_record
    from lowbit.core.checkpoint.gguf_source import GgufSource

    source = GgufSource(file)
    tensors: dict[str, dict[str, Any]] = {
        name: {"type": tensor.ggml_type, "shape": list(tensor.shape), "bytes": tensor.nbytes}
        for name, tensor in source.tensors.items()
    }
    record = read_gguf_record(file)
    changed = changed_files(file, record) if check else None
    weights = sum(_count(tensor["shape"]) for tensor in tensors.values())
    summary: dict[str, Any] = {
        "files": [path.name for path in source.files],
        "architecture": source.architecture,
        "weights": weights,
        "bits_per_weight": 8 * sum(tensor["bytes"] for tensor in tensors.values()) / max(weights, 1),
        "types": _by_type(tensors),
        "metadata": source.metadata,
        "tensors": tensors,
    }
    if as_json:
        extra = {} if changed is None else {"changed_files": changed}
        print(json.dumps({**summary, "record": record, **extra}, indent=2, ensure_ascii=False))
    else:
        _print(summary, record, layers)
    if changed:
        raise CheckpointError(f"{', '.join(changed)} differ from their checksums", hint="copy or quantize it again")
    if changed == [] and not as_json:
        print("checksums  ok")


def _by_type(tensors: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    counts = Counter(tensor["type"] for tensor in tensors.values())
    return {
        kind: {
            "tensors": count,
            "weights": sum(_count(tensor["shape"]) for tensor in tensors.values() if tensor["type"] == kind),
            "bytes": sum(tensor["bytes"] for tensor in tensors.values() if tensor["type"] == kind),
        }
        for kind, count in counts.most_common()
    }


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _print(summary: dict[str, Any], record: dict[str, Any] | None, every: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"file       {', '.join(summary['files'])}")
    console.print(f"model      {summary['architecture']}, {summary['weights']:,} weights, "
                  f"{summary['bits_per_weight']:.3f} bits a weight over all tensors")  # fmt: skip
    table = Table("type", "tensors", "weights", "bits/weight", "MiB", header_style="bold")
    for kind, row in summary["types"].items():
        bits = f"{8 * row['bytes'] / row['weights']:.3f}"
        table.add_row(kind, str(row["tensors"]), f"{row['weights']:,}", bits, f"{row['bytes'] / 2**20:.2f}")
    console.print(table)
    if every:
        table = Table("tensor", "type", "shape", "relative error", header_style="bold")
        errors = {name: layer["error"] for name, layer in record["layers"].items()} if record else {}
        for name, tensor in summary["tensors"].items():
            error = errors.get(name)
            shape = " x ".join(map(str, tensor["shape"]))
            table.add_row(name, tensor["type"], shape, "" if error is None else f"{error:.5f}")
        console.print(table)
    for key, value in summary["metadata"].items():
        if key != "tokenizer.chat_template":
            console.print(f"{key} = {_short(value)}", markup=False, highlight=False)
    template = summary["metadata"].get("tokenizer.chat_template")
    console.print("chat template" if template else "no chat template")
    if template:
        console.print(str(template), markup=False, highlight=False, style="dim")
    measured = (record or {}).get("verification")
    if measured:
        console.print(f"verified   KL {measured['kl']:.5f} ± {measured['kl_error']:.5f} nats, "
                      f"perplexity {measured['perplexity']:.3f} (base {measured['base_perplexity']:.3f})")  # fmt: skip


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} values: {', '.join(str(item)[:20] for item in value[:4])} ..."
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= _LONG else text[: _LONG - 3] + "..."
