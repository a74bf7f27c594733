"""What the linear layers of a block are given: statistics of their inputs over all calibration windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat

from torch import Tensor

from lowbit.core.contracts import Needs
from lowbit.core.statistics import InputStatistics
from lowbit.pipeline.job import BlockJob

# tokens whose inputs are kept as they are, for methods and transforms that ask for a sample
_SAMPLED_TOKENS = 512


def watch(job: BlockJob, needs: Mapping[str, Needs], *, on_to: int | None = None) -> dict[str, InputStatistics]:
    """Statistics of the inputs of layers by name, over all calibration windows; `needs` in order of execution.

    on_to: how far the original model's states go on in the same pass, when nobody will ask for them here again.
    """
    watched = list(needs)
    if not watched or job.arriving is None:
        return {}
    states = job.arriving.states
    length = states.states.shape[1]
    every = max(1, states.total * length // _SAMPLED_TOKENS)
    statistics = {
        name: InputStatistics(
            job.columns(name),
            job.model.device,
            gram=need.gram,
            cross=need.original,
            sizes=need.inputs,
            sample_every=every if need.sample else 0,
            before=states.first * length,
        )
        for name, need in needs.items()
    }
    compares = job.original is not None and any(need.original for need in needs.values())
    originals: Iterator[dict[str, Tensor]] = repeat({}, len(list(states.batches())))
    if compares and job.original is not None:
        originals = job.original.inputs(watched, on_to=on_to, weights=job.weights if job.transforms else None)
    for inputs, compared in zip(job.arriving.inputs(watched), originals, strict=True):
        for name, given in inputs.items():  # an expert may have been given nothing
            statistics[name].add(given, compared.get(name))
    for one in statistics.values():
        one.finish(job.world)
    return statistics
