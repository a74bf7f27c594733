"""Tensor by tensor from one GGUF model into another: copied, or encoded as another type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from lowbit.core.checkpoint.gguf_source import GgufSource, dequantized
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
    if not names:
        return
    job.progress.start("encode", len(names))
    wanted = [name for name in names if not job.is_done(name)]
    for _ in range(len(names) - len(wanted)):
        job.progress.advance()
    with Behind(job, provisional) as behind:
        for name, stored in read_ahead(job.source, wanted):
            job.progress.note(f"{name} as {job.types[name]}")
            behind.write(name, _encoded(job, name, stored, importance or {}))
            job.progress.advance()


def read_ahead(source: GgufSource, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors' bytes; while one is worked on, the next is read."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        coming: Future[Tensor] | None = None
        for name, after in zip_longest(names, names[1:]):
            stored = coming.result() if coming else source.stored(name)
            coming = reader.submit(source.stored, after) if after else None
            yield name, stored


class Behind:
    """Writes tensors while the next is encoded; they count as done once they are safely on disk. A context manager: at its
    end all are, unless something was raised. Raises OutputError, for what was begun before too."""

    def __init__(self, job: GgufJob, provisional: Sequence[str] = ()) -> None:
        self.job, self.provisional = job, provisional
        self.waiting: dict[str, float | None] = {}
        self.size = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._begun: Future[None] | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._wait()
            self.job.done(self.waiting)

    def write(self, name: str, data: Tensor, error: float | None = None) -> None:
        """Begin to write a tensor's bytes, uint8; error: its relative output error where that was measured."""
        self._wait()
        self._begun = self._thread.submit(self._write, name, data, error)

    def finish(self) -> None:
        """Begin to make what was written count as done."""
        self._wait()
        self._begun = self._thread.submit(self._finish)

    def _write(self, name: str, data: Tensor, error: float | None) -> None:
        self.job.writer.write(name, data)
        if name not in self.provisional:
            self.waiting[name] = error
        self.size += data.numel()
        if self.size >= _SYNC_BYTES:
            self._finish()

    def _finish(self) -> None:
        self.job.done(self.waiting)
        self.waiting, self.size = {}, 0

    def _wait(self) -> None:
        if self._begun is not None:
            self._begun.result()


def _encoded(job: GgufJob, name: str, stored: Tensor, importance: Mapping[str, Importance]) -> Tensor:
    """A tensor's bytes in its new type, uint8 [nbytes]."""
    tensor = job.source.tensors[name]
    if tensor.ggml_type == job.types[name]:
        return stored
    dense = dequantized(stored.to(job.device), tensor)
    columns = tensor.shape[-1]
    matrices = dense.view(-1, *tensor.shape[-2:]) if len(tensor.shape) > 2 else dense.view(1, -1, columns)
    means = means_of(importance, name, len(matrices), columns)
    parts = [
        encode(job.types[name], matrix, None if means is None else means[at].to(job.device))
        for at, matrix in enumerate(matrices)
    ]
    return torch.cat(parts).cpu().view(-1)
