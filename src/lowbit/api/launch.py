"""`lowbit quantize --gpus N`: the same command again in N processes, through torchrun's own launcher."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.core import errors
from lowbit.core.distributed import GGUF_MADE, LEARNED, check_windows, refuse_several_processes
from lowbit.core.errors import DistributedError, LowbitError, RecipeError
from lowbit.recipe import Recipe

# where the launcher looks for a worker's last words; torchrun sets it for every process it starts
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def check_gpus(count: int, device: str) -> None:
    """Raises RecipeError when `count` processes cannot have a GPU each; on `--device cpu` any number can run."""
    import torch

    if count < 1:
        raise RecipeError(f"--gpus {count} makes no sense", hint="--gpus 1 or more")
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--gpus takes GPUs in order, and --device names one: {device}", hint="leave --device out")
    have = torch.cuda.device_count()
    if device != "cpu" and count > have:
        raise RecipeError(f"--gpus {count}: this machine has {have}", hint=f"--gpus {have}" if have else "--device cpu")


def check_shared(recipe: Recipe, count: int) -> None:
    """Raises RecipeError for what `count` processes cannot share, before they are started for it."""
    if recipe.format == "gguf":
        refuse_several_processes(GGUF_MADE, count)
    if recipe.tune.steps or recipe.method == "autoround":
        refuse_several_processes(LEARNED, count)
    check_windows(recipe.calibration.num_samples, count)


def launch(count: int, arguments: Sequence[str]) -> None:
    """Run `lowbit ARGUMENTS` in `count` processes on this machine; returns when all have ended well.

    When one fails, the others are ended. Raises the LowbitError that the first to fail reported, or DistributedError.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # what the launcher says of a failure is said below in one sentence
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=f"lowbit-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "lowbit", *arguments)
        except ChildFailedError as error:
            raise _cause(error.failures) from error


def report_failure(error: LowbitError) -> None:
    """Leave an error for `launch`, which says it once for all processes."""
    said = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    content = {"message": json.dumps(said), "timestamp": str(int(time.time()))}
    Path(os.environ[_ERROR_FILE]).write_text(json.dumps(content))


def _cause(failures: dict[int, Any]) -> LowbitError:
    """The first error that is not only the loss of another process."""
    reported = []
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            return DistributedError(
                f"process {rank} was ended by {signal.Signals(-failure.exitcode).name}; nothing that was finished is lost",
                hint="look at its memory, then run the same command again to continue where it stopped",
            )
        reported.append(_reported(failure.message, rank))
    own = [error for error in reported if not isinstance(error, DistributedError)]
    return (own or reported)[0]


def _reported(message: str, rank: int) -> LowbitError:
    try:
        said = json.loads(message)
        kind: type[LowbitError] = getattr(errors, said["kind"])
        return kind(said["message"], hint=said["hint"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return DistributedError(
            f"process {rank} failed without a word that lowbit knows; what it printed is above",
            hint="run the same command again to continue where it stopped",
        )
