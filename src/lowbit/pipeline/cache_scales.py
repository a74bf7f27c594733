"""Scales for a KV cache of 8 bit floats, found while calibrating."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from lowbit.pipeline.job import BlockJob

_LARGEST = 448.0
# rotary embeddings mix pairs of channels after the key projection: no key grows by more than this
_ROTATION = math.sqrt(2)


def cache_scales(job: BlockJob, layers: Sequence[str]) -> list[Tensor]:
    """[] float32 for keys and for values: the largest output of each over all calibration windows, on the largest code."""
    assert job.arriving is not None
    largest = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            largest[name] = max(largest[name], output.abs().max().item())
            if name == layers[-1]:
                raise _Seen

        return job.module.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in layers]
    try:
        for where in job.arriving.states.batches():
            with suppress(_Seen):
                job.model.run_block(job.index, job.module, job.arriving.states.get(where, job.model.device))
    finally:
        for handle in handles:
            handle.remove()
    keys, values = (max(largest[name], 1e-6) for name in layers)
    return [torch.tensor(keys * _ROTATION / _LARGEST), torch.tensor(values / _LARGEST)]


class _Seen(Exception):  # noqa: N818 - control flow, not an error
    """Values come last: the rest of the block need not run."""
