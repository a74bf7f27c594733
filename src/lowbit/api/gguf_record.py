"""What goes with a GGUF file: keys inside it, and beside it the record, a model card and an Ollama Modelfile."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from lowbit import __version__
from lowbit.core.errors import CheckpointError
from lowbit.core.ggml_types import GGML_TYPES, file_type
from lowbit.evals.divergence import Measurement
from lowbit.formats.gguf import PlannedTensor, number_pair, text_pair
from lowbit.formats.gguf_imatrix import ImportanceMatrix
from lowbit.pipeline.gguf_encode import GgufJob
from lowbit.pipeline.writer import output_errors, sha256_of
from lowbit.recipe import Recipe


def companion_names(name: str) -> list[str]:
    """The file and all that will be written beside it."""
    stem = name.removesuffix(".gguf")
    return [name, f"{stem}.lowbit.json", f"{stem}.card.md", f"{stem}.Modelfile"]


def provenance(
    recipe: Recipe,
    base: str,
    identity: str,
    digest: str | None,
    matrix: ImportanceMatrix | None,
    entries: int,
    windows: Tensor | None,
) -> dict[str, bytes]:
    """Keys that are new in the file or replace the source's: its type, who made it of what, and, as llama-quantize writes
    them, where its statistics come from. A local base is named without its directory."""
    local = Path(base).exists()
    keys = {
        "general.file_type": number_pair("general.file_type", file_type(recipe.method).id),
        "general.quantization_version": number_pair("general.quantization_version", 2),
    }
    texts = {
        "general.quantized_by": f"lowbit {__version__}",
        "general.lowbit.recipe": recipe.yaml(),
        "general.lowbit.base": Path(base).name if local else base,
        "general.lowbit.base_identity": identity,
    }
    if digest is not None:
        texts["general.lowbit.calibration_sha256"] = digest
    if matrix is not None:
        texts["quantize.imatrix.file"] = Path(str(recipe.options.get("imatrix") or "lowbit")).name
        texts["quantize.imatrix.dataset"] = ", ".join(Path(name).name for name in matrix.datasets)
        entries, chunks = len(matrix.tensors), matrix.chunks
    elif windows is not None:
        texts["quantize.imatrix.file"] = "lowbit"
        texts["quantize.imatrix.dataset"] = Path(recipe.calibration.dataset).name
        chunks = len(windows)
    else:
        return keys | {key: text_pair(key, value) for key, value in texts.items()}
    keys["quantize.imatrix.entries_count"] = number_pair("quantize.imatrix.entries_count", entries)
    keys["quantize.imatrix.chunks_count"] = number_pair("quantize.imatrix.chunks_count", chunks)
    return keys | {key: text_pair(key, value) for key, value in texts.items()}


def gguf_record(
    recipe: Recipe,
    base: str,
    identity: str,
    job: GgufJob,
    checksums: Mapping[str, str],
    digest: str | None,
    measurement: Measurement | None,
) -> dict[str, Any]:
    """lowbit.json of a GGUF file; "layers" are its tensors under their GGUF names."""
    tensors = job.source.tensors
    errors = job.errors()
    planned = [PlannedTensor(name, tensors[name].shape, kind) for name, kind in job.types.items()]
    return {
        "lowbit": __version__,
        "recipe": recipe.model_dump(mode="json"),
        "base": {
            "name": base,
            "identity": identity,
            "model_type": job.source.architecture,
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        },
        "calibration": {"windows_sha256": digest} if digest else None,
        "bits_per_weight": bits_per_weight(planned),
        "bytes": sum(tensor.nbytes for tensor in planned),
        "layers": {
            tensor.name: {
                "scheme": {"name": tensor.ggml_type},
                "shape": list(tensor.shape),
                "error": errors.get(tensor.name),
            }
            for tensor in planned
        },
        "checksums": dict(checksums),
        "verification": measurement.to_dict() if measurement else None,
    }


def bits_per_weight(planned: list[PlannedTensor]) -> float:
    """Bits a weight over all quantized tensors, with all scales; over all tensors where none is quantized."""
    chosen = [tensor for tensor in planned if GGML_TYPES[tensor.ggml_type].quantized] or planned
    return 8 * sum(tensor.nbytes for tensor in chosen) / sum(tensor.rows * tensor.shape[-1] for tensor in chosen)


def write_companions(directory: Path, name: str, first: str, record: Mapping[str, Any]) -> None:
    """Model card and Modelfile into `directory`. first: the (first) model file's name. Raises OutputError."""
    stem = name.removesuffix(".gguf")
    with output_errors(directory):
        (directory / f"{stem}.card.md").write_text(card(first, record))
        (directory / f"{stem}.Modelfile").write_text(
            f"# ollama create {stem.lower()} -f {stem}.Modelfile\nFROM ./{first}\n"
        )


def card(first: str, record: Mapping[str, Any]) -> str:
    """A model card for the hub (README.md there)."""
    recipe, base = record["recipe"], record["base"]
    kinds = Counter(layer["scheme"]["name"] for layer in record["layers"].values())
    local = Path(base["name"]).exists()
    front: dict[str, Any] = {"library_name": "gguf", "pipeline_tag": "text-generation", "tags": ["lowbit", "llama.cpp"]}
    if not local:
        front |= {"base_model": base["name"], "base_model_relation": "quantized"}
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {Path(base['name']).name}, {recipe['method'].upper()}",
        "",
        f"Made with [lowbit](https://pypi.org/project/lowbit/) {record['lowbit']}. "
        f"`llama-server -m {first}`, or `ollama create NAME -f` the Modelfile beside it.",
        "",
        "| | |",
        "|---|---|",
        f"| size | {record['bytes'] / 2**20:,.0f} MiB (base {base['bytes'] / 2**20:,.0f} MiB) |",
        f"| bits per quantized weight | {record['bits_per_weight']:.2f} |",
        f"| tensor types | {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())} |",
        *_measured(record.get("verification")),
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False).strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _measured(measured: Mapping[str, Any] | None) -> list[str]:
    if measured is None:
        return ["| measured | not verified (--no-verify) |"]
    return [
        f"| perplexity | {measured['perplexity']:.3f} ± {measured['perplexity_error']:.3f} "
        f"(base {measured['base_perplexity']:.3f}) |",
        f"| KL divergence from the base | {measured['kl']:.5f} ± {measured['kl_error']:.5f} nats |",
        f"| measured on | {measured['windows']} held-out windows of {measured['context']} tokens |",
    ]


def read_gguf_record(file: Path) -> dict[str, Any] | None:
    """The record beside a GGUF file (of a split one, of any of its parts), or None."""
    stem = file.name.removesuffix(".gguf")
    names = [f"{stem}.lowbit.json"]
    if "-of-" in stem:
        names.append(f"{stem.rsplit('-', 3)[0]}.lowbit.json")
    for name in names:
        record = file.with_name(name)
        if record.is_file():
            content: dict[str, Any] = json.loads(record.read_text())
            return content
    return None


def changed_files(file: Path, record: Mapping[str, Any] | None) -> list[str]:
    """Names of a model's files that are missing or differ from their recorded checksum. Raises CheckpointError without a
    record."""
    if record is None:
        raise CheckpointError(f"{file.name} has no record beside it, so there are no checksums to compare")
    return [
        name
        for name, digest in record["checksums"].items()
        if not file.with_name(name).is_file() or sha256_of(file.with_name(name)) != digest
    ]
