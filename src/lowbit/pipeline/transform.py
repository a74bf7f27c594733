"""Transforms of one block: watch it as it is, search scales for every place of the architecture table, move them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from lowbit.core.contracts import Needs
from lowbit.core.errors import ArchitectureError
from lowbit.core.statistics import InputStatistics
from lowbit.methods.rtn import round_trip
from lowbit.pipeline.job import BlockJob
from lowbit.pipeline.plan import LayerPlan
from lowbit.pipeline.watch import watch
from lowbit.transforms.scaling import Place, Problem, apply, places, representable, scale_statistics_

# share of the block's own contribution that moving scales may change by rounding; a wrong architecture row changes more
_TOLERANCE = 0.1
# batches that the exact objective runs a module on for each candidate
_PRICED_BATCHES = 4


def transform_block(job: BlockJob, note: Callable[[str], None]) -> dict[str, InputStatistics]:
    """Replace the job's weights, and the module's, by transformed ones. Returns the statistics of the inputs they now
    have, by the first layer of each group: one pass over the calibration states serves transforms and methods.

    Raises ArchitectureError when the block does not compute what it did before.
    """
    before = dict(job.weights)
    statistics = watch(job, _needs(job))
    weights = dict(before)
    for planned in job.transforms:
        for place in places(job.model.architecture, weights, job.model.checkpoint.config):
            targets = [name for name in place.targets if f"{job.path}.{name}" in job.layers]
            if not targets:
                continue
            note(f"{job.path} {planned.transform.name} {place.source} -> {', '.join(place.targets)}")
            own = statistics[_group_of(job, targets[0])]
            problem = _problem(job, weights, place, targets, own, exact=planned.transform.exact(planned.options))
            dtype = before[f"{place.source}.weight"].dtype
            found = job.world.same_(planned.transform.search(problem, planned.options).contiguous())
            scales = representable(weights, place, found, dtype)
            apply(weights, place, scales)
            scale_statistics_(own, place.to_columns(scales))
    job.weights = {name: _as_stored(job, name, tensor, before[name]) for name, tensor in weights.items()}
    _check_unchanged(job, before)
    changed = {name: tensor for name, tensor in job.weights.items() if tensor is not before[name]}
    job.module.load_state_dict(
        {name: tensor.to(job.model.dtype) for name, tensor in changed.items()}, strict=False, assign=True
    )
    job.module.requires_grad_(False)
    return statistics


def _needs(job: BlockJob) -> dict[str, Needs]:
    """What transforms want of every group, and what methods want besides, by the group's first layer."""
    wanted = functools.reduce(Needs.__or__, (planned.transform.needs(planned.options) for planned in job.transforms))
    own = [
        functools.reduce(Needs.__or__, (job.layers[f"{job.path}.{name}"].needs for name in group))
        for group in job.groups()
    ]
    # what `original` inputs differ by depends on the scales: watched later
    return {
        group[0]: Needs(gram=wanted.gram or needs.gram, inputs=True, sample=wanted.sample)
        for group, needs in zip(job.groups(), own, strict=True)
    }


def _group_of(job: BlockJob, name: str) -> str:
    return next(group[0] for group in job.groups() if name in group)


def _problem(
    job: BlockJob,
    weights: Mapping[str, Tensor],
    place: Place,
    targets: Sequence[str],
    statistics: InputStatistics,
    *,
    exact: bool,
) -> Problem:
    matrices = [_matrix(weights, place, name) for name in targets]
    plans = [job.layers[f"{job.path}.{name}"] for name in targets]

    def quantize(stacked: Tensor) -> Tensor:
        parts = torch.split(stacked, [len(matrix) for matrix in matrices])
        return torch.cat([_rounded(job, plan, part) for plan, part in zip(plans, parts, strict=True)])

    stacked = torch.cat(matrices)
    parent = targets[0].rpartition(".")[0]
    price = None
    if exact and parent and _leaves_before_end(job, targets[0]):
        price = _module_price(job, weights, place, targets, stacked, quantize, parent)
    return Problem(place, stacked, statistics, quantize, price)


def _matrix(weights: Mapping[str, Tensor], place: Place, name: str) -> Tensor:
    weight = weights[f"{name}.weight"].float()
    return weight.T if place.transposed else weight


def _rounded(job: BlockJob, plan: LayerPlan, weight: Tensor) -> Tensor:
    """A quick rounding to the layer's scheme: integers to the plain grid, whatever the method will do later."""
    scheme, dtype = plan.scheme.weights, job.scale_dtype(plan)
    assert scheme is not None
    if scheme.kind == "int":
        return round_trip(weight, scheme, dtype)
    quantized = plan.method.quantize(weight, None, scheme, plan.options, dtype)
    dense: Tensor = quantized.tensor.dequantize()
    return dense


def _leaves_before_end(job: BlockJob, name: str) -> bool:
    """Whether other linear layers of the same module come after `name`; the last one's output is the module's."""
    parent = name.rpartition(".")[0]
    own = [group for group in job.model.architecture.linears if group[0].rpartition(".")[0] == parent]
    return name not in own[-1]


def _module_price(
    job: BlockJob,
    weights: Mapping[str, Tensor],
    place: Place,
    targets: Sequence[str],
    stacked: Tensor,
    quantize: Callable[[Tensor], Tensor],
    parent: str,
) -> Callable[[Tensor], float]:
    """Price scales by running the block up to the end of module `parent` with its targets rounded."""
    sizes = [_matrix(weights, place, name).shape[0] for name in targets]
    wanted = [output.clone() for output in _outputs(job, parent, {})]

    def price(columns: Tensor) -> float:
        rounded = torch.split(quantize(stacked * columns) / columns, sizes)
        replaced = {
            f"{name}.weight": (part.T if place.transposed else part).to(job.model.dtype).contiguous()
            for name, part in zip(targets, rounded, strict=True)
        }
        outputs = _outputs(job, parent, replaced)
        total = torch.zeros((), dtype=torch.float64, device=job.model.device)
        for output, right in zip(outputs, wanted, strict=True):
            total += (output - right).float().square().mean()
        return job.world.sum_(total).item()

    return price


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """The module's output is known: the rest of the block need not run."""


def _outputs(job: BlockJob, name: str, replaced: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs of a module of the block on the first batches of calibration states, as far as this process holds them,
    with some weights replaced."""
    assert job.arriving is not None
    priced = max(0, _PRICED_BATCHES - -(-job.arriving.states.first // job.arriving.states.batch))
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = job.module.get_submodule(name).register_forward_hook(hook)
    try:
        for _, where in zip(range(priced), job.arriving.states.batches(), strict=False):
            with suppress(_Reached):
                job.model.run_block(job.index, job.module, job.arriving.states.get(where, job.model.device), replaced)
    finally:
        handle.remove()
    return seen


def _as_stored(job: BlockJob, name: str, tensor: Tensor, before: Tensor) -> Tensor:
    """Quantized layers keep float32 until they are rounded; whatever else changed is rounded to how it is stored."""
    if tensor is before or f"{job.path}.{name.removesuffix('.weight')}" in job.layers:
        return tensor
    return tensor.to(before.dtype)


def _check_unchanged(job: BlockJob, before: Mapping[str, Tensor]) -> None:
    if job.arriving is None:
        return
    hidden = job.arriving.states.get(next(job.arriving.states.batches()), job.model.device)
    outputs = [
        job.model.run_block(
            job.index, job.module, hidden, {name: tensor.to(job.model.dtype) for name, tensor in weights.items()}
        ).float()
        for weights in (before, job.weights)
    ]
    moved = (outputs[1] - outputs[0]).norm() / (outputs[0] - hidden.float()).norm().clamp_min(1e-12)
    if not moved < _TOLERANCE:
        raise ArchitectureError(
            f"moving scales changed what {job.path} computes by {moved:.1%}: its row in the table of architectures does "
            "not fit this model, nothing was written",
            hint="leave the transform out, or correct the scalings in lowbit/core/architectures.py",
        )
