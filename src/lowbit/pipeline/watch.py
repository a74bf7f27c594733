"""What the linear layers of a block are given: statistics of their inputs over all calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from torch import Tensor, nn

from lowbit.core.contracts import Needs
from lowbit.core.statistics import InputStatistics
from lowbit.pipeline.job import BlockJob

# tokens whose inputs are kept as they are, for methods and transforms that ask for a sample
_SAMPLED_TOKENS = 512


def watch(job: BlockJob, needs: Mapping[str, Needs]) -> dict[str, InputStatistics]:
    """Statistics of the inputs of layers by name, over all calibration windows; `needs` in order of execution."""
    watched = list(needs)
    if not watched or job.arriving is None:
        return {}
    length = job.arriving.states.shape[1]
    every = max(1, job.arriving.total * length // _SAMPLED_TOKENS)
    statistics = {
        name: InputStatistics(
            job.matrix(name).shape[1],
            job.model.device,
            gram=need.gram,
            cross=need.original,
            sample_every=every if need.sample else 0,
            before=job.arriving.first * length,
        )
        for name, need in needs.items()
    }
    compare = job.original is not None and any(need.original for need in needs.values())
    original_weights = {name: tensor.to(job.model.dtype) for name, tensor in job.weights.items()} if compare else None
    for where in job.arriving.batches():
        hidden = job.arriving.get(where, job.model.device)
        inputs = _inputs_of(job, watched, hidden, None)
        originals: dict[str, Tensor] = {}
        if original_weights is not None and job.original is not None:
            originals = _inputs_of(job, watched, job.original.get(where, job.model.device), original_weights)
        for name in watched:
            statistics[name].add(inputs[name], originals.get(name))
    for one in statistics.values():
        one.finish(job.world)
    return statistics


class _Seen(Exception):  # noqa: N818 - control flow, not an error
    """Every watched layer has been reached: the rest of the block need not run."""


def _inputs_of(
    job: BlockJob, names: Sequence[str], hidden: Tensor, weights: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Inputs of the named layers for one batch; the block is left as soon as the last of them is reached."""
    seen: dict[str, Tensor] = {}
    with _hooked(job.module, names, seen), suppress(_Seen):
        job.model.run_block(job.index, job.module, hidden, weights)
    return seen


@contextmanager
def _hooked(module: nn.Module, names: Sequence[str], seen: dict[str, Tensor]) -> Iterator[None]:
    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]
            if len(seen) == len(names):
                raise _Seen

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
