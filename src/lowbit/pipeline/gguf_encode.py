"""Tensor by tensor from one GGUF model into another: copied, or encoded as another type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from lowbit.core.checkpoint.gguf_source import GgufSource, dequantized
from lowbit.core.progress import Progress
from lowbit.core.staging import Download, Upload
from lowbit.formats.gguf_imatrix import Importance, means_of
from lowbit.methods.kquants import encode
from lowbit.pipeline.gguf_writer import GgufWriter
from lowbit.pipeline.journal import Journal

_CPU = torch.device("cpu")
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
        for name, stored in read_ahead(job.source, wanted, job.device):
            job.progress.note(f"{name} as {job.types[name]}")
            behind.write(name, _encoded(job, name, stored, importance or {}))
            job.progress.advance()


def read_ahead(source: GgufSource, names: Sequence[str], device: torch.device = _CPU) -> Iterator[tuple[str, Tensor]]:
    """Tensors' bytes on the device; while one is worked on, the next is read."""
    with _reader(source, device) as stored, ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        coming: Future[Tensor] | None = None
        for name, after in zip_longest(names, names[1:]):
            data = coming.result() if coming else stored(name)
            coming = reader.submit(stored, after) if after else None
            if data.is_cuda:  # it came on a stream of its own
                data.record_stream(torch.cuda.current_stream(device))
            yield name, data


@contextmanager
def _reader(source: GgufSource, device: torch.device) -> Iterator[Callable[[str], Tensor]]:
    if device.type != "cuda":
        yield source.stored
        return
    with Upload(device) as upload:
        yield lambda name: upload.filled(
            source.tensors[name].nbytes, lambda start, piece: source.read_into(name, start, piece)
        )


class Behind:
    """Writes tensors while the next is encoded, brings them from the GPU before, and makes what was written safe on disk
    meanwhile; then they count as done. A context manager: at its end all are, unless something was raised. Raises
    OutputError, for what was begun before too."""

    def __init__(self, job: GgufJob, provisional: Sequence[str] = ()) -> None:
        self.job, self.provisional = job, provisional
        self.waiting: dict[str, float | None] = {}
        self.size = 0
        self._download = Download(job.device) if job.device.type == "cuda" else None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._written: Future[None] | None = None
        self._saved: Future[None] | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._writer.shutdown()
        self._saver.shutdown()
        if kind is None:
            _wait(self._written)
            _wait(self._saved)
            self.job.done(self.waiting)

    def write(self, name: str, data: Tensor, error: float | None = None) -> None:
        """Begin to write a tensor's bytes, uint8; error: its relative output error where that was measured."""
        _wait(self._written)
        data = data.contiguous()
        ready = torch.cuda.current_stream(data.device).record_event() if data.is_cuda else None
        self._written = self._writer.submit(self._write, name, data, ready, error)

    def finish(self) -> None:
        """Begin to make what was written count as done."""
        _wait(self._written)
        self._written = self._writer.submit(self._finish)

    def _write(self, name: str, data: Tensor, ready: torch.cuda.Event | None, error: float | None) -> None:
        if ready is None or self._download is None:
            self.job.writer.write(name, data)
        else:
            self.job.writer.write_pieces(name, self._download.pieces(data, ready))
        if name not in self.provisional:
            self.waiting[name] = error
        self.size += data.numel()
        if self.size >= _SYNC_BYTES:
            self._finish()

    def _finish(self) -> None:
        _wait(self._saved)  # what is not on the disk yet stays bounded
        self._saved = self._saver.submit(self._save, self.waiting)
        self.waiting, self.size = {}, 0

    def _save(self, reports: Mapping[str, float | None]) -> None:
        self.job.done(reports)
        self.job.writer.hash_ahead()


def _wait(begun: Future[None] | None) -> None:
    if begun is not None:
        begun.result()


def _encoded(job: GgufJob, name: str, stored: Tensor, importance: Mapping[str, Importance]) -> Tensor:
    """A tensor's bytes in its new type, uint8 of any shape, on the job's device."""
    tensor = job.source.tensors[name]
    if tensor.ggml_type == job.types[name]:
        return stored
    dense = dequantized(stored, tensor)
    columns = tensor.shape[-1]
    matrices = dense.view(-1, *tensor.shape[-2:]) if len(tensor.shape) > 2 else dense.view(1, -1, columns)
    means = means_of(importance, name, len(matrices), columns)
    parts = [
        encode(job.types[name], matrix, None if means is None else means[at].to(job.device))
        for at, matrix in enumerate(matrices)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
