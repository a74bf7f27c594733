"""One decoder block: watch what its linear layers are given, choose their numbers, put those in place.

Linear layers that share an input share its statistics, and are stacked: the same Hessian serves all their rows. With
`sequential`, each group of layers is watched after the groups before it have been quantized, so that it sees the inputs
it will really be given. Transforms come first, and see the whole block as it was.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowbit.core.contracts import Needs, Quantized
from lowbit.core.qtensor import QTensor
from lowbit.core.statistics import InputStatistics
from lowbit.methods.inputs import with_input_scale
from lowbit.pipeline.job import BlockJob, BlockResult, place_weight
from lowbit.pipeline.plan import needs_input_scale
from lowbit.pipeline.transform import transform_block
from lowbit.pipeline.watch import watch

# rows whose error is measured at a time: bounds the temporaries
_ROWS = 1024


def quantize_block(job: BlockJob, *, sequential: bool, note: Callable[[str], None]) -> BlockResult:
    """Transform a block and quantize its planned layers, in order of execution; the module holds the result afterwards."""
    known: dict[str, InputStatistics] = {}
    if job.transforms:
        known = transform_block(job, note)
    result = BlockResult(weights=job.weights)
    groups = job.groups()
    steps = [[group] for group in groups] if sequential else [groups]
    for number, step in enumerate(steps):
        statistics = _statistics(job, step, known, stale=sequential and number > 0)
        for group in step:
            shared, stacks = statistics.pop(group[0], None), _stacks(job, group)
            for stack in stacks:
                note(f"{job.path} {', '.join(name.rpartition('.')[2] for name in stack)}")
                # methods may empty what they are given: only the last stack gets the statistics themselves
                _quantize_stack(job, stack, shared if stack is stacks[-1] else copy.copy(shared), result)
    return result


def _statistics(
    job: BlockJob, step: Sequence[Sequence[str]], known: dict[str, InputStatistics], *, stale: bool
) -> dict[str, InputStatistics]:
    """Statistics for a step: those that the transforms left, unless a method wants to see what quantization has changed
    since (`stale`), or more than they hold; else by watching."""
    found: dict[str, InputStatistics] = {}
    missing: dict[str, Needs] = {}
    for group in step:
        needs, left = _needs_of(job, group), known.pop(group[0], None)
        covered = left is not None and not needs.original and (left.gram is not None or not needs.gram)
        if left is not None and covered and not (stale and needs.calibration):
            found[group[0]] = left
        elif needs.calibration:
            missing[group[0]] = needs
    return found | watch(job, missing)


def _quantize_stack(
    job: BlockJob, names: Sequence[str], statistics: InputStatistics | None, result: BlockResult
) -> None:
    """Quantize layers that share input, scheme and method as one tall matrix, and put each part in its place."""
    plan = job.layers[f"{job.path}.{names[0]}"]
    stacked = job.matrix(names[0]) if len(names) == 1 else torch.cat([job.matrix(name) for name in names])
    dtype = job.scale_dtype(plan)
    quantized: Quantized = plan.method.quantize(stacked, statistics, plan.scheme.weights, plan.options, dtype)
    if statistics is not None and needs_input_scale(plan.scheme):
        quantized = with_input_scale(quantized, statistics, plan.scheme, dtype)
    start = 0
    for name in names:
        path = f"{job.path}.{name}"
        stop = start + job.layers[path].shape[0]
        weight, tensor = stacked[start:stop], rows_of(quantized.tensor, start, stop)
        start = stop
        dense = tensor.dequantize(torch.float32)
        result.tensors[path] = tensor
        result.errors[path] = relative_error(weight, dense, statistics)
        if quantized.notes:
            result.notes[path] = list(quantized.notes)
        place_weight(job.model, job.module, name, dense)


def relative_error(weight: Tensor, quantized: Tensor, statistics: InputStatistics | None) -> float:
    """Share of the layer's output power that rounding changed: |(W - Q) X|^2 / |W X|^2; without statistics, of the weights."""
    gram = None if statistics is None else statistics.gram

    def power(rows: Tensor) -> Tensor:
        return rows.square().sum() if gram is None else ((rows @ gram) * rows).sum()

    changed = total = torch.zeros((), device=weight.device)
    for original, rounded in zip(torch.split(weight, _ROWS), torch.split(quantized, _ROWS), strict=True):
        changed = changed + power(original - rounded)
        total = total + power(original)
    return (changed / total.clamp_min(1e-30)).item()


def rows_of(tensor: QTensor, start: int, stop: int) -> QTensor:
    """Output rows of a quantized matrix."""
    if (start, stop) == (0, tensor.shape[0]):
        return tensor
    zero = None if tensor.zero is None else tensor.zero[start:stop]
    scale = tensor.scale[start:stop]
    return QTensor(tensor.codes[start:stop], scale, tensor.scheme, zero, tensor.group_index, tensor.extra)


def _stacks(job: BlockJob, group: Sequence[str]) -> list[list[str]]:
    """Layers of one input group that can be quantized in one go: same scheme, method and options, scales by row."""
    stacks: dict[tuple[object, ...], list[str]] = {}
    for name in group:
        plan = job.layers[f"{job.path}.{name}"]
        weights = plan.scheme.weights
        # bitsandbytes' nested scales span rows, as those of blocks and tensors do
        apart = weights is None or weights.granularity in ("tensor", "block") or weights.kind in ("nf4", "fp4")
        stacks.setdefault((plan.scheme, plan.method.name, plan.options, name if apart else ""), []).append(name)
    return list(stacks.values())


def _needs_of(job: BlockJob, group: Sequence[str]) -> Needs:
    return functools.reduce(Needs.__or__, (job.layers[f"{job.path}.{name}"].needs for name in group))
