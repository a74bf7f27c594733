"""One stream of calibration states on its way through one block: before it, between its halves, or behind it.

Most decoders add attention to the residual stream and then a feed-forward part: h + A(h), then h + B(h). Once the layers of
A are quantized, the states can move on to where B begins, and no later pass computes A again. A half ends with one linear
layer as a rule: when that layer's inputs have just been watched they are kept, as far as there is room, and moving on is
h + layer(inputs). That a block is so built is not taken from a table but tried: with B giving zeros and then A giving zeros
it must compute, bit for bit, what it does, and so must the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.architectures import Architecture
from lowbit.core.streamed_model import StreamedModel
from lowbit.pipeline.activations import Activations

BEFORE, BETWEEN, BEHIND = 0, 1, 2
# bytes that nobody will miss
_LITTLE = 1 << 28


@dataclass(frozen=True)
class Halves:
    """Names of a block's two submodules, in order, and whether each returns a tuple that begins with the states.
    closing: the linear layer of each whose output is what the half adds to the states, where there is one."""

    names: tuple[str, str]
    tuples: tuple[int, int]
    closing: tuple[str | None, str | None] = (None, None)


@dataclass
class Passage:
    """states: where they stand is `at`. weights: by name within the block, instead of the module's own.
    halves: None when the block can only be run whole."""

    model: StreamedModel
    index: int
    module: nn.Module
    states: Activations
    weights: Mapping[str, Tensor] | None = None
    halves: Halves | None = None
    at: int = BEFORE
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def place_before(self, layer: str | None) -> int:
        """How far the states can go on before the named layer is reached; behind the block for None."""
        if layer is None:
            return BEHIND
        return BEFORE if self.halves is None or layer.startswith(f"{self.halves.names[0]}.") else BETWEEN

    def advance(self, to: int) -> None:
        """Take the states on, in place; does nothing where they are already there."""
        if to <= self.at or (to == BETWEEN and self.halves is None):
            return
        weights = self._weights(to, self.weights)
        if to != self.at + 1:  # what is kept leads to the end of this half only
            self._kept.clear()
        for where in self.states.batches():
            kept = self._kept.pop(where.start, None)
            self.states.put(where, self._run(where, to, weights) if kept is None else self._close(where, kept))
        self.at = to

    def inputs(
        self, names: Sequence[str], *, on_to: int | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """The inputs of the named layers, batch by batch; of the block with `weights`, if given. A batch is left as soon as
        the last of them is reached, or taken on in the same pass. Those of the layer that a half ends with are kept until
        the states move on: nothing before that layer may change in between."""
        keeps = on_to is None and weights is None and self.weights is None and list(names) == [self._closing()]
        to = BEHIND if on_to is None else on_to
        weights = self._weights(to, self.weights if weights is None else weights)
        for where in self.states.batches():
            seen: dict[str, Tensor] = {}
            # hooks and stand-ins do not outlast a batch: another stream takes its turn at the same block in between
            with _hooked(self.module, names, seen, leave=on_to is None), suppress(_Seen):
                after = self._run(where, to, weights)
                if on_to is not None:
                    self.states.put(where, after)
            if keeps:
                self._keep(where, seen[names[0]])
            yield seen
        if on_to is not None:
            self.at = on_to

    def _closing(self) -> str | None:
        """The layer that ends the half in front of which the states stand."""
        return None if self.halves is None or self.at == BEHIND else self.halves.closing[self.at]

    def _keep(self, where: slice, inputs: Tensor) -> None:
        """Keep a layer's inputs of one batch, as long as all that are kept take no more than the states leave, or little."""
        room = 0 if self.states.spilled else max(self.states.room, _LITTLE)
        if sum(kept.nbytes for kept in self._kept.values()) + inputs.nbytes <= room:
            self._kept[where.start] = inputs

    def _close(self, where: slice, inputs: Tensor) -> Tensor:
        closing = self._closing()
        assert closing is not None
        output: Tensor = self.module.get_submodule(closing)(inputs)
        return self.states.get(where, self.model.device) + output

    def _run(self, where: slice, to: int, weights: Mapping[str, Tensor] | None) -> Tensor:
        hidden = self.states.get(where, self.model.device)
        left_out = self._left_out(to)
        if left_out is None or self.halves is None:
            return self.model.run_block(self.index, self.module, hidden, weights)
        with _without(self.module, self.halves, left_out):
            return self.model.run_block(self.index, self.module, hidden, weights)

    def _left_out(self, to: int) -> int | None:
        """Which half is not run on the way from here to there."""
        if self.halves is None or (self.at, to) == (BEFORE, BEHIND):
            return None
        return 0 if self.at == BETWEEN else 1

    def _weights(self, to: int, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Those of the halves that are run, in the computing dtype."""
        if weights is None:
            return None
        left_out = self._left_out(to)
        absent = "" if left_out is None or self.halves is None else f"{self.halves.names[left_out]}."
        return {
            name: tensor.to(self.model.dtype)
            for name, tensor in weights.items()
            if not absent or not name.startswith(absent)
        }


class HalvesFinder:
    """Tries once for each kind of block whether it consists of two halves."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], Halves | None] = {}

    def find(self, model: StreamedModel, index: int, module: nn.Module, states: Activations) -> Halves | None:
        """The halves of a filled block, tried on the first batch of the states before it."""
        kind = tuple(type(child).__name__ for child in (module, *module.children()))
        if kind not in self._found:
            self._found[kind] = _try(model, index, module, states)
        return self._found[kind]


def _try(model: StreamedModel, index: int, module: nn.Module, states: Activations) -> Halves | None:
    names = _containers(model.architecture)
    if len(names) != 2:
        return None
    closing = [_last_linear(model.architecture, module, name) for name in names]
    hidden = states.get(next(states.batches()), model.device)
    whole, outputs = _run_noting(model, index, module, hidden, [*names, *(name for name in closing if name)])
    tuples = [_length(outputs.get(name), hidden) for name in names]
    if tuples[0] is None or tuples[1] is None:
        return None
    halves = Halves((names[0], names[1]), (tuples[0], tuples[1]))
    try:
        with _without(module, halves, 1):
            between = model.run_block(index, module, hidden)
        with _without(module, halves, 0):
            behind = model.run_block(index, module, between)
    except (TypeError, AttributeError):  # the block wants more of its parts than states
        return None
    if not torch.equal(whole, behind):
        return None
    first, second = (
        name if name and _is_sum(before, outputs.get(name), after) else None
        for name, before, after in zip(closing, (hidden, between), (between, behind), strict=True)
    )
    return replace(halves, closing=(first, second))


def _run_noting(
    model: StreamedModel, index: int, module: nn.Module, hidden: Tensor, names: Sequence[str]
) -> tuple[Tensor, dict[str, Any]]:
    """The block's output, and those of its named parts."""
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs[name] = output

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        return model.run_block(index, module, hidden), outputs
    finally:
        for handle in handles:
            handle.remove()


def _last_linear(architecture: Architecture, module: nn.Module, container: str) -> str | None:
    """The layer that runs last in a part of the block; None where several share the last input."""
    present = {name for name, _ in module.named_modules()}
    groups = [group for group in architecture.linears if group[0] in present and group[0].startswith(f"{container}.")]
    return groups[-1][0] if groups and len(groups[-1]) == 1 else None


def _is_sum(before: Tensor, output: Any, after: Tensor) -> bool:
    return isinstance(output, Tensor) and output.shape == before.shape and torch.equal(before + output, after)


def _containers(architecture: Architecture) -> list[str]:
    """Children of a block that hold its linear layers, in order of execution."""
    return list(
        dict.fromkeys(name.partition(".")[0] for group in architecture.linears for name in group if "." in name)
    )


def _length(output: Any, hidden: Tensor) -> int | None:
    """0 for states alone, the length of a tuple that begins with them (attention weights may follow, which blocks drop);
    None for any other output."""
    if isinstance(output, Tensor):
        return 0 if output.shape == hidden.shape else None
    if isinstance(output, tuple) and isinstance(output[0], Tensor) and output[0].shape == hidden.shape:
        return len(output)
    return None


@contextmanager
def _without(module: nn.Module, halves: Halves, which: int) -> Iterator[None]:
    """One of the halves adds nothing."""
    name = halves.names[which]
    taken = module.get_submodule(name)
    stand_in = _Nothing(taken, halves.tuples[which])
    # a child that is registered under the checkpoint's name is called by another (core/experts.py)
    aliases = [alias for alias, value in vars(module).items() if value is taken]
    _put_in_place(module, name, aliases, stand_in)
    try:
        yield
    finally:
        _put_in_place(module, name, aliases, taken)


def _put_in_place(module: nn.Module, name: str, aliases: Sequence[str], child: nn.Module) -> None:
    setattr(module, name, child)
    for alias in aliases:
        object.__setattr__(module, alias, child)


class _Nothing(nn.Module):
    """Stands where a half was and gives zeros."""

    def __init__(self, stood_for: nn.Module, length: int) -> None:
        super().__init__()
        object.__setattr__(self, "stood_for", stood_for)
        self.length = length

    def __getattr__(self, name: str) -> Any:
        # blocks may read attributes of their parts
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stood_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        zeros = torch.zeros((), dtype=states.dtype, device=states.device).expand(states.shape)
        return (zeros, *[None] * (self.length - 1)) if self.length else zeros


class _Seen(Exception):  # noqa: N818 - control flow, not an error
    """Every watched layer has been reached: the rest of the block need not run."""


@contextmanager
def _hooked(module: nn.Module, names: Sequence[str], seen: dict[str, Tensor], *, leave: bool) -> Iterator[None]:
    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]
            if leave and len(seen) == len(names):
                raise _Seen

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
