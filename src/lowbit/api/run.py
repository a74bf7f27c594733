"""How a run is carried out, and what it gives: what every kind of quantization has in common."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.environments import default_root

if TYPE_CHECKING:
    from lowbit.pipeline.self_sampling import Shelves


@dataclass(frozen=True)
class Result:
    """A finished artifact: where it is, its lowbit.json record, and what its making cost."""

    path: Path
    record: dict[str, Any]
    run: dict[str, Any]

    @property
    def measurement(self) -> dict[str, Any] | None:
        """What verification measured."""
        return self.record.get("verification")


@dataclass(frozen=True)
class Settings:
    """How a run is carried out; none of it changes what the artifact means.

    max_memory: bytes that calibration states may take before they spill to disk. max_kl (nats), min_recovery (percent, of
    perplexity): what verification asks of the result. texts: the directory where text is kept that models wrote, and taken
    again; None: `texts_directory`.
    """

    device: str = "auto"
    max_memory: int | None = None
    revision: str | None = None
    verify: bool = True
    max_kl: float | None = None
    restart: bool = False
    min_recovery: float | None = None
    texts: Path | None = None

    def shelves(self, work: Path) -> Shelves:
        """Where text that the model writes is looked for and kept, `work` being the directory of the unfinished artifact."""
        from lowbit.pipeline.self_sampling import Shelves  # torch with it, which commands' options do without

        return Shelves(work, self.texts or texts_directory())


def texts_directory() -> Path:
    """`$XDG_CACHE_HOME/lowbit/texts`, by default in `~/.cache`. It may be deleted."""
    return default_root().parent / "texts"


def run_cost(resumed_blocks: int, seconds: float, verification: float, peak: Mapping[str, float]) -> dict[str, Any]:
    """What a run took: seconds with and without verification apart, peak memory in MiB, as `lowbit-run.json` keeps it."""
    import torch

    return {
        "seconds": round(seconds, 2),
        "verification_seconds": round(verification, 2),
        "resumed_blocks": resumed_blocks,
        "peak_memory_mib": {name: round(value, 1) for name, value in peak.items()},
        "threads": torch.get_num_threads(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
