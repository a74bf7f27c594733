"""lowbit.json: what an artifact says of itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowbit import __version__
from lowbit.core.streamed_model import StreamedModel
from lowbit.evals.divergence import Measurement
from lowbit.pipeline.plan import Plan
from lowbit.pipeline.run import RunReport
from lowbit.pipeline.writer import sha256_of
from lowbit.recipe import Recipe


def record_of(
    plan: Plan,
    model: StreamedModel,
    base: Mapping[str, Any],
    recipe: Recipe,
    report: RunReport,
    *,
    checksums: Mapping[str, str],
    calibration: str | None,
    measurement: Measurement | None,
) -> dict[str, Any]:
    """base: name, identity, model_type and bytes of the checkpoint. checksums: sha256 by file. calibration: digest of its
    windows."""
    weights, bits = plan.quantized_bits()
    return {
        "lowbit": __version__,
        "recipe": recipe.model_dump(mode="json"),
        "base": dict(base),
        "calibration": {"windows_sha256": calibration} if calibration else None,
        "versions": {"torch": torch.__version__, "compute": f"{model.device.type} {model.dtype}"},
        "bits_per_weight": bits / weights if weights else plan.dtype.itemsize * 8,
        "bytes": plan.nbytes,
        "layers": {
            path: {
                "scheme": dataclasses.asdict(layer.scheme),
                "method": layer.method.name,
                "shape": list(layer.shape),
                "error": report.errors.get(path),
                **({"notes": report.notes[path]} if path in report.notes else {}),
            }
            for path, layer in plan.layers.items()
        },
        "checksums": dict(checksums),
        "verification": measurement.to_dict() if measurement else None,
    }


def read_record(artifact: Path) -> dict[str, Any] | None:
    """The lowbit.json of an artifact, or None."""
    file = artifact / "lowbit.json"
    return json.loads(file.read_text()) if file.is_file() else None


def verify_checksums(artifact: Path, record: Mapping[str, Any]) -> list[str]:
    """Names of files that are missing or differ from their recorded checksum."""
    return [
        name
        for name, digest in record.get("checksums", {}).items()
        if not (artifact / name).is_file() or sha256_of(artifact / name) != digest
    ]
