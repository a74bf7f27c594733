"""Several processes that quantize one model together: who this one is, and what they tell each other.

Started by torchrun (or `lowbit quantize --gpus`), each process has a device of its own, sees its share of the calibration
windows and chooses its share of the rows; sums and results are exchanged, so that every process knows the same numbers.
One process alone is a World of size 1, and everything below is then free.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbit.core.errors import DistributedError, RecipeError

T = TypeVar("T")
# a process that waits longer than this for another takes it for dead; the leader samples text and opens files meanwhile
_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """A process among `size`, numbered from 0; the leader is 0, and alone writes files and talks. Here: the only one."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def shares(self, count: int) -> list[slice]:
        """Every process's part of `count` things in a row; the parts differ by one at most."""
        return [slice(count * rank // self.size, count * (rank + 1) // self.size) for rank in range(self.size)]

    def share(self, count: int) -> slice:
        """This process's part of them."""
        return self.shares(count)[self.rank]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes: bit for bit the same in each."""
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its largest values over all processes."""
        return tensor

    def total(self, count: int) -> int:
        """The sum of every process's count."""
        return count

    def lengths(self, part: Tensor) -> list[int]:
        """How many rows every process has."""
        return [len(part)]

    def concatenate(self, part: Tensor, lengths: Sequence[int]) -> Tensor:
        """The parts of all processes one after another, along the first dimension; lengths: of each of them."""
        return part

    def from_leader(self, compute: Callable[[], T]) -> T:
        """What the leader computes, given to all. Its LowbitErrors end the leader, and with it the others."""
        return compute()

    def same_(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by the leader's."""
        self.begin_same_(tensor, rank=0)()
        return tensor

    def begin_same_(self, tensor: Tensor, rank: int) -> Callable[[], None]:
        """Replace a contiguous tensor by that of one process, while other work goes on: what is returned waits for it, or has
        the GPU wait. Nothing may touch the tensor before that."""
        return lambda: None


ALONE = World()


@dataclass(frozen=True)
class _Ranks(World):
    """Processes joined by torch.distributed: NCCL for what is on GPUs, gloo for what is on CPUs.

    connected: done when GPUs can talk to each other, which takes NCCL a second or two.
    """

    connected: Future[None] | None = None

    def sum_(self, tensor: Tensor) -> Tensor:
        with self._talking_about(tensor):
            torch.distributed.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        with self._talking_about(tensor):
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor

    def total(self, count: int) -> int:
        return int(self.sum_(torch.tensor(count)))

    def lengths(self, part: Tensor) -> list[int]:
        rows = torch.tensor([len(part)])
        counts = [torch.empty_like(rows) for _ in range(self.size)]
        with self._talking_about(rows):
            torch.distributed.all_gather(counts, rows)
        return [int(count) for count in counts]

    def concatenate(self, part: Tensor, lengths: Sequence[int]) -> Tensor:
        # as bytes, since not every dtype can be sent; padded, since not every backend takes different lengths
        flat = part.reshape(len(part), math.prod(part.shape[1:])).contiguous().view(torch.uint8)
        padded = torch.nn.functional.pad(flat, (0, 0, 0, max(lengths) - len(part)))
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._talking_about(padded):
            torch.distributed.all_gather(parts, padded)
        whole = torch.cat([one[:length] for one, length in zip(parts, lengths, strict=True)])
        return whole.view(part.dtype).view(sum(lengths), *part.shape[1:])

    def from_leader(self, compute: Callable[[], T]) -> T:
        value: list[Any] = [compute() if self.leads else None]
        with _lost_processes():
            torch.distributed.broadcast_object_list(value, src=0)
        leaders: T = value[0]
        return leaders

    def begin_same_(self, tensor: Tensor, rank: int) -> Callable[[], None]:
        with self._talking_about(tensor):
            work = torch.distributed.broadcast(tensor, src=rank, async_op=True)

        def wait() -> None:
            with _lost_processes():
                work.wait()

        return wait

    @contextmanager
    def _talking_about(self, tensor: Tensor) -> Iterator[None]:
        with _lost_processes():
            if tensor.is_cuda and self.connected is not None:
                self.connected.result()
            yield


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun (or lowbit itself) started."""
    return torch.distributed.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this process may print and write: it is alone, or the first of those that torchrun started."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


# work that only one process can do
GGUF_MADE = "GGUF files are made"
LEARNED = "rounding and scales are learned (--effort best, --tune, autoround)"


def refuse_several_processes(what: str, count: int | None = None) -> None:
    """Raises RecipeError for GGUF_MADE or LEARNED by several processes: `count` of them, or those that torchrun started."""
    if started_by_torchrun() if count is None else count > 1:
        raise RecipeError(f"{what} by one process only", hint="run it without --gpus and without torchrun")


def check_windows(windows: int, processes: int) -> None:
    """Raises RecipeError where there are not as many calibration windows as processes."""
    if windows < processes:
        raise RecipeError(
            f"{windows} calibration windows cannot be shared by {processes} processes",
            hint="more --num-samples, or fewer GPUs",
        )


def own_device(device: torch.device) -> torch.device:
    """`cuda` without a number: the GPU that torchrun's numbering gives this process. Raises RecipeError when there are
    fewer GPUs than processes on this machine."""
    if device.type != "cuda" or not started_by_torchrun():
        return device
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise RecipeError(
            f"process {local + 1} on this machine has no GPU of its own: there are {torch.cuda.device_count()}",
            hint="start one process a GPU (--gpus, --nproc-per-node), or use --device cpu",
        )
    return torch.device("cuda", local)


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world of this process, for as long as it takes part in it. All leave together.

    Raises DistributedError when the other processes cannot be reached.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    else:  # processes of one machine share its cores
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
    with _lost_processes("a node that is not reachable under its host name names its network: GLOO_SOCKET_IFNAME=eth0"):
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
    with ThreadPoolExecutor(1) as pool:
        # text is sampled and files are opened meanwhile
        connected = pool.submit(_connect, device) if cuda else None
        # after an error the process ends: leaving in good order would wait for others that are waiting for this one
        yield _Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), connected)
    with _lost_processes():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _connect(device: torch.device) -> None:
    """Have NCCL find the other GPUs, which it does at the first thing they say."""
    torch.cuda.set_device(device)  # a thread's own
    torch.distributed.all_reduce(torch.zeros(1, device=device))
    torch.cuda.synchronize(device)


@contextmanager
def _lost_processes(hint: str = "run the same command again to continue where it stopped") -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DistributedError(
            f"another process of this run ended or cannot be reached ({reason}): nothing that was finished is lost",
            hint=hint,
        ) from error
