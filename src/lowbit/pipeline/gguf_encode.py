"""Tensor by tensor from one GGUF model into another: copied, or encoded as another type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.progress import Progress
from lowbit.formats.gguf_imatrix import Importance, means_of
from lowbit.methods.kquants import encode
from lowbit.pipeline.gguf_writer import GgufWriter
from lowbit.pipeline.journal import Journal

_SYNC_BYTES = 256 * 2**20


@dataclass(frozen=True)
class GgufJob:
    """What is being made: source, the type of every tensor by name in file order, where it goes, what is done already."""

    source: GgufSource
    types: Mapping[str, str]
    writer: GgufWriter
    journal: Journal
    device: torch.device
    progress: Progress

    def is_done(self, name: str) -> bool:
        return self._number(name) in self.journal.blocks

    def done(self, reports: Mapping[str, float | None]) -> None:
        """Tensors are safely on disk: name -> relative output error, None where it was not measured."""
        self.writer.sync()
        for name, error in reports.items():
            self.journal.done(self._number(name), {"error": error})

    def errors(self) -> dict[str, float]:
        """Relative output errors by tensor name, of all that were measured."""
        names = list(self.types)
        return {
            names[number]: line["error"]
            for number, line in sorted(self.journal.blocks.items())
            if line["error"] is not None
        }

    def _number(self, name: str) -> int:
        return list(self.types).index(name)


def encode_tensors(
    job: GgufJob,
    names: Sequence[str],
    importance: Mapping[str, Importance] | None = None,
    provisional: Sequence[str] = (),
) -> None:
    """Encode (or copy) the named tensors as llama-quantize does, with their importance where there is some. What is
    `provisional` among them is written but does not count as done: it will be written again."""
    job.progress.start("encode", len(names))
    waiting: dict[str, float | None] = {}
    size = 0
    for name in names:
        if not job.is_done(name):
            job.progress.note(f"{name} as {job.types[name]}")
            data = encoded(job, name, importance or {})
            job.writer.write(name, data)
            if name not in provisional:
                waiting[name] = None
            size += data.numel()
        job.progress.advance()
        if size >= _SYNC_BYTES:
            job.done(waiting)
            waiting, size = {}, 0
    job.done(waiting)


def encoded(job: GgufJob, name: str, importance: Mapping[str, Importance]) -> Tensor:
    """A tensor's bytes in its new type, uint8 [nbytes]."""
    tensor = job.source.tensors[name]
    if tensor.ggml_type == job.types[name]:
        return job.source.stored(name)
    dense = job.source.dense(name).to(job.device)
    columns = tensor.shape[-1]
    matrices = dense.view(-1, *tensor.shape[-2:]) if len(tensor.shape) > 2 else dense.view(1, -1, columns)
    means = means_of(importance, name, len(matrices), columns)
    parts = [
        encode(job.types[name], matrix, None if means is None else means[at].to(job.device))
        for at, matrix in enumerate(matrices)
    ]
    return torch.cat(parts).cpu().view(-1)
