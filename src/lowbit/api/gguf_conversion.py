"""From any checkpoint to an unquantized GGUF: llama.cpp's own converter, in its side environment.

It writes the header first and then one tensor after the other, so a tensor can be read as soon as the file is that long:
quantizing does not wait for the conversion to end.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import CheckpointError, SideEnvironmentError
from lowbit.core.progress import Progress
from lowbit.environments import child_variables, python_of

ENVIRONMENT = "gguf-convert"
_SOURCE, _PARTIAL = "source.gguf", "source.partial.gguf"
_OUT_TYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
# seconds between two looks at how far the converter has come
_PAUSE = 0.05


def converted(checkpoint: Checkpoint, work: Path, progress: Progress) -> GgufSource:
    """The checkpoint as GGUF in `work`, converted there unless an earlier run did it. Raises SideEnvironmentError when the
    converter is not installed or refuses the model, CheckpointError when it finds no weights."""
    with converting(checkpoint, work, progress) as source:
        if source.wait_for is not None:
            source.wait_for(source.data_end)
    if not (work / _SOURCE).is_file():  # no hard links here
        (work / _PARTIAL).replace(work / _SOURCE)
    return GgufSource(work / _SOURCE)


@contextmanager
def converting(checkpoint: Checkpoint, work: Path, progress: Progress) -> Iterator[GgufSource]:
    """The same, as soon as its header is there; reading a tensor waits for it. Left before the end, the conversion ends too.
    Raises SideEnvironmentError and CheckpointError, and so does reading."""
    target = work / _SOURCE
    if target.is_file():
        yield GgufSource(target)
        return
    progress.start("convert", 1)
    stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    conversion = _Conversion(checkpoint.location, work, _OUT_TYPES.get(stored, "auto"))
    try:
        source = conversion.source()
        progress.advance()
        yield source
    finally:
        conversion.stop()


def drop_converted(work: Path) -> None:
    """Remove the intermediate file."""
    for name in (_SOURCE, _PARTIAL):
        (work / name).unlink(missing_ok=True)


class _Conversion:
    """The converter at work on `model`, in a process of its own."""

    def __init__(self, model: Path, work: Path, out_type: str) -> None:
        self.model, self.partial, self.target = model, work / _PARTIAL, work / _SOURCE
        self.size: int | None = None  # of the whole file, once its header says so
        self.command = [str(python_of(ENVIRONMENT)), "-m", "convert_hf_to_gguf", str(model)]
        # a converter that outlived a killed run goes on writing to a file without a name
        self.partial.unlink(missing_ok=True)
        self.errors = tempfile.TemporaryFile(dir=work)  # noqa: SIM115 - closed by stop
        self.process = subprocess.Popen(
            [*self.command, "--outfile", str(self.partial), "--outtype", out_type],
            env=child_variables(None),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
        )

    def source(self) -> GgufSource:
        """The file that is being written, once its header is."""
        while True:
            ended = self._ended()
            if self.partial.is_file():
                try:
                    source = GgufSource(self.partial, wait_for=self.wait_for)
                except CheckpointError:  # the header is not all there
                    if ended:
                        raise
                else:
                    return self._with_weights(source)
            time.sleep(_PAUSE)

    def wait_for(self, size: int) -> None:
        """Return when the file has that many bytes. Raises SideEnvironmentError when it will not have them."""
        while self.partial.stat().st_size < size:
            if self._ended() and self.partial.stat().st_size < size:
                raise self._refused("it ended too early")
            time.sleep(_PAUSE)

    def stop(self) -> None:
        """End the converter; a file that it has finished is kept under its final name for a later run."""
        with suppress(subprocess.TimeoutExpired):
            # all that was waited for is there: it has only to leave
            self.process.wait(timeout=10 if self._complete() else 0)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.returncode == 0 and self.partial.is_file():
            with suppress(OSError):  # without hard links a later run converts again
                os.link(self.partial, self.target)
        self.errors.close()

    def _complete(self) -> bool:
        return self.size is not None and self.partial.is_file() and self.partial.stat().st_size >= self.size

    def _ended(self) -> bool:
        """Whether the converter has ended well. Raises SideEnvironmentError when it has failed."""
        code = self.process.poll()
        if code is None:
            return False
        if code != 0 or not self.partial.is_file():
            raise self._refused(f"exit code {code}")
        return True

    def _refused(self, otherwise: str) -> SideEnvironmentError:
        self.errors.seek(0)
        lines = [line for line in self.errors.read().decode(errors="replace").strip().splitlines() if line.strip()]
        self.partial.unlink(missing_ok=True)
        return SideEnvironmentError(
            f"llama.cpp's converter could not convert {self.model}: {lines[-1][:300] if lines else otherwise}",
            hint=f"{' '.join(self.command)} --dry-run shows all it has to say",
        )

    def _with_weights(self, source: GgufSource) -> GgufSource:
        if source.tensors:
            self.size = source.data_end
            return source
        self.partial.unlink()
        raise CheckpointError(
            f"llama.cpp's converter found no weights in {self.model}: it reads model*.safetensors only",
            hint="rename the files (and their names in model.safetensors.index.json)",
        )
