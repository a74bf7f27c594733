"""One decoder block: watch what its linear layers are given, choose their numbers, put those in place.

Linear layers that share an input share its statistics, and are stacked: the same Hessian serves all their rows. With
`sequential`, each group of layers is watched after the groups before it have been quantized, so that it sees the inputs
it will really be given. Transforms come first, and see the whole block as it was.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowbit.core.contracts import Needs, Quantized
from lowbit.core.qtensor import QTensor
from lowbit.core.statistics import InputStatistics
from lowbit.core.streamed_model import StreamedModel
from lowbit.methods.inputs import with_input_scale
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.plan import LayerPlan, TransformPlan, needs_input_scale

ScaleDtype = Callable[[LayerPlan], torch.dtype]
# tokens whose inputs are kept as they are, for methods and transforms that ask for a sample
_SAMPLED_TOKENS = 512
# rows whose error is measured at a time: bounds the temporaries
_ROWS = 1024


@dataclass
class BlockResult:
    """The numbers of a block's layers by module path, their relative errors, and what the methods had to say.

    weights: all of the block's tensors by name within it, as the transforms left them.
    """

    weights: Mapping[str, Tensor]
    tensors: dict[str, QTensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class BlockJob:
    """A block with its weights as stored, the layers to quantize in it, and the calibration states before it.

    weights: by name within the block; transforms replace them. arriving: hidden states that come out of the quantized
    prefix; None without calibration. original: those of the unquantized model, when a method compares.
    """

    model: StreamedModel
    index: int
    module: nn.Module
    weights: Mapping[str, Tensor]
    layers: Mapping[str, LayerPlan]
    arriving: Activations | None
    original: Activations | None
    scale_dtype: ScaleDtype
    transforms: Sequence[TransformPlan] = ()

    @property
    def path(self) -> str:
        """Module path of the block."""
        return self.model.block_path(self.index)

    def matrix(self, name: str) -> Tensor:
        """The weight [out, in] float32 of one of the block's linear layers."""
        weight = self.weights[f"{name}.weight"].float()
        return weight.T.contiguous() if self.model.architecture.transposed else weight

    def groups(self) -> list[list[str]]:
        """Names of the layers to quantize, by shared input, in order of execution."""
        planned = [
            [name for name in group if f"{self.path}.{name}" in self.layers]
            for group in self.model.architecture.linears
        ]
        return [group for group in planned if group]


def quantize_block(job: BlockJob, *, sequential: bool, note: Callable[[str], None]) -> BlockResult:
    """Transform a block and quantize its planned layers, in order of execution; the module holds the result afterwards."""
    known: dict[str, InputStatistics] = {}
    if job.transforms:
        from lowbit.pipeline.transform import transform_block

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


def place_weight(model: StreamedModel, module: nn.Module, name: str, dense: Tensor) -> None:
    """Give a linear layer of the block the weight [out, in] that a runtime will compute with."""
    linear = module.get_submodule(name)
    oriented = dense.T if model.architecture.transposed else dense
    linear.weight = nn.Parameter(oriented.to(model.dtype).contiguous(), requires_grad=False)


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


def watch(job: BlockJob, needs: Mapping[str, Needs]) -> dict[str, InputStatistics]:
    """Statistics of the inputs of layers by name, over all calibration windows; `needs` in order of execution."""
    watched = list(needs)
    if not watched or job.arriving is None:
        return {}
    every = max(1, job.arriving.states[..., 0].numel() // _SAMPLED_TOKENS)
    statistics = {
        name: InputStatistics(
            job.matrix(name).shape[1],
            job.model.device,
            gram=need.gram,
            cross=need.original,
            sample_every=every if need.sample else 0,
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
        one.finish()
    return statistics


def _needs_of(job: BlockJob, group: Sequence[str]) -> Needs:
    return functools.reduce(Needs.__or__, (job.layers[f"{job.path}.{name}"].needs for name in group))


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
