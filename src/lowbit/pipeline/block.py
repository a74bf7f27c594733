"""One decoder block: watch what its linear layers are given, choose their numbers, put those in place.

Linear layers that share an input share its statistics, and are stacked: the same Hessian serves all their rows. With
`sequential`, each group of layers is watched after the groups before it have been quantized, so that it sees the inputs
it will really be given. Transforms come first, and see the whole block as it was.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.core.contracts import Needs, Quantized
from lowbit.core.distributed import World
from lowbit.core.qtensor import QTensor
from lowbit.core.statistics import InputStatistics, output_powers, rough_products, tensor_float32_products
from lowbit.methods.inputs import with_input_scale
from lowbit.pipeline import experts
from lowbit.pipeline.job import BlockJob, BlockResult, place_weight
from lowbit.pipeline.passage import BEFORE, BETWEEN
from lowbit.pipeline.plan import LayerPlan, needs_input_scale
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
    columns = [job.columns(group[0]) for group in groups]
    steps: Sequence[Sequence[Sequence[str]]] = [groups]
    if sequential:
        steps = experts.steps(job.model.architecture, groups, columns)
    for number, step in enumerate(steps):
        following = steps[number + 1][0][0] if number + 1 < len(steps) else None
        until = BEFORE if job.arriving is None else job.arriving.place_before(following)
        statistics = _statistics(job, step, known, stale=sequential and number > 0, until=until)
        unseen = _for_unseen(job, statistics)
        for group in step:
            shared, stacks = statistics.pop(group[0], None), _stacks(job, group)
            for stack in stacks:
                note(f"{job.path} {', '.join(name.rpartition('.')[2] for name in stack)}")
                # methods may empty what they are given: only the last stack gets the statistics themselves
                own = shared if stack is stacks[-1] else copy.copy(shared)
                _quantize_stack(job, stack, own, result, unseen.get(group[0]))
        if until == BETWEEN:
            for stream in (job.arriving, job.original):
                if stream is not None:
                    stream.advance(BETWEEN)
    return result


def _statistics(
    job: BlockJob, step: Sequence[Sequence[str]], known: dict[str, InputStatistics], *, stale: bool, until: int
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
    at = BEFORE if job.original is None else job.original.at
    # transformed weights are another rounding of the original: its states go on through what is stored
    return found | watch(job, missing, on_to=until if until > at and not job.transforms else None)


def _for_unseen(job: BlockJob, statistics: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
    """For experts that saw too few tokens: the statistics of all experts that were watched with them."""
    kinds: dict[int, list[str]] = {}
    for name, one in statistics.items():
        if experts.is_expert(job.model.architecture, name):
            kinds.setdefault(one.features, []).append(name)
    found: dict[str, InputStatistics] = {}
    for names in kinds.values():
        few = [name for name in names if experts.saw_too_few(statistics[name])]
        if few:
            found.update(dict.fromkeys(few, experts.of_all_experts([statistics[name] for name in names])))
    return found


def _quantize_stack(
    job: BlockJob,
    names: Sequence[str],
    statistics: InputStatistics | None,
    result: BlockResult,
    unseen: InputStatistics | None,
) -> None:
    """Quantize layers that share input, scheme and method as one tall matrix, and put each part in its place.

    unseen: what to go by instead of `statistics`, for an expert that saw too few tokens.
    """
    plan = job.layers[f"{job.path}.{names[0]}"]
    stacked = job.matrix(names[0]) if len(names) == 1 else torch.cat([job.matrix(name) for name in names])
    if unseen is not None and statistics is not None:
        statistics = unseen
        quantized = experts.round_unseen(stacked, unseen, plan, job.scale_dtype(plan))
    else:
        quantized = _by_all(job, plan, stacked, statistics)
    if statistics is not None and needs_input_scale(plan.scheme):
        quantized = with_input_scale(quantized, statistics, plan.scheme, job.scale_dtype(plan))
    powers = torch.zeros(len(stacked), 2, device=stacked.device)
    parts = dict(
        zip(names, torch.split(powers, [job.layers[f"{job.path}.{name}"].shape[0] for name in names]), strict=True)
    )
    start = 0
    for name, part in parts.items():
        path, stop = f"{job.path}.{name}", start + len(part)
        tensor = rows_of(quantized.tensor, start, stop)
        dense = tensor.dequantize(torch.float32)
        _measure_(part, stacked[start:stop], dense, statistics, job.world)
        result.tensors[path] = tensor
        if quantized.notes:
            result.notes[path] = list(quantized.notes)
        place_weight(job.model, job.module, name, dense)
        start = stop
    job.world.sum_(powers)
    sums = torch.stack([part.sum(0) for part in parts.values()])
    errors = (sums[:, 0] / sums[:, 1].clamp_min(1e-30)).tolist()
    result.errors.update({f"{job.path}.{name}": error for name, error in zip(names, errors, strict=True)})


def _by_all(job: BlockJob, plan: LayerPlan, stacked: Tensor, statistics: InputStatistics | None) -> Quantized:
    """The method's numbers; every process chooses its share of the rows where rows do not depend on each other, and all
    rows where they do, from the same statistics."""
    scheme, dtype = plan.scheme.weights, job.scale_dtype(plan)
    if not plan.by_row or job.world.size > len(stacked):
        alone: Quantized = plan.method.quantize(stacked, statistics, scheme, plan.options, dtype)
        return alone
    own = stacked[job.world.share(len(stacked))]
    part: Quantized = plan.method.quantize(own, statistics, scheme, plan.options, dtype)
    if job.world.size == 1:
        return part
    tensor = part.tensor
    rows = [share.stop - share.start for share in job.world.shares(len(stacked))]
    whole = replace(
        tensor,
        codes=job.world.concatenate(tensor.codes, rows),
        scale=job.world.concatenate(tensor.scale, rows),
        zero=None if tensor.zero is None else job.world.concatenate(tensor.zero, rows),
    )
    return Quantized(whole, part.notes)


def _measure_(
    powers: Tensor, weight: Tensor, quantized: Tensor, statistics: InputStatistics | None, world: World
) -> None:
    """Fill in powers [out, 2]: of what rounding changed in each output, (w - q) X, and of the output, w X; without
    statistics, of the weights. Every process measures its share of the rows."""
    gram = None if statistics is None else statistics.gram
    share = world.share(len(weight))
    for start in range(share.start, share.stop, _ROWS):
        rows = slice(start, min(start + _ROWS, share.stop))
        with tensor_float32_products(weight.device):
            powers[rows, 0] = _power(weight[rows] - quantized[rows], gram)
        with rough_products(weight.device):  # unlike the errors, weights are not chosen to cancel
            powers[rows, 1] = _power(weight[rows], gram)


def _power(rows: Tensor, gram: Tensor | None) -> Tensor:
    return rows.square().sum(1) if gram is None else output_powers(rows, gram)


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
    needs = functools.reduce(Needs.__or__, (job.layers[f"{job.path}.{name}"].needs for name in group))
    return experts.needs_of_expert(needs) if experts.is_expert(job.model.architecture, group[0]) else needs
