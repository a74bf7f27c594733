"""Reading ahead: while one block is computed on a GPU, the tensors of the next come off the disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.core.contracts import Checkpoint, TensorSpec


class Prefetching:
    """contracts.Checkpoint around another one. Announced tensors wait in host memory until they are read, once."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner = inner
        self.location: Path = inner.location
        self.config: dict[str, Any] = inner.config
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: dict[str, Future[Tensor]] = {}

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Those of the inner checkpoint."""
        return self.inner.tensors

    def announce(self, names: Iterable[str]) -> None:
        """Start to read these tensors."""
        for name in names:
            if name not in self._coming:
                self._coming[name] = self._reader.submit(self.inner.read, name)

    def read(self, name: str) -> Tensor:
        """An announced tensor as soon as it is there, any other one now. Raises CheckpointError."""
        coming = self._coming.pop(name, None)
        return self.inner.read(name) if coming is None else coming.result()

    def companions(self) -> dict[str, Path]:
        """Those of the inner checkpoint."""
        return self.inner.companions()

    def identity(self) -> str:
        """That of the inner checkpoint."""
        return self.inner.identity()
