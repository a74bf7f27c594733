"""States on their way through one block: halves compute what the whole does, bit for bit, or are not used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.streamed_model import StreamedModel
from lowbit.pipeline import passage
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.passage import BEHIND, BETWEEN, HalvesFinder, Passage
from lowbit.pipeline.streams import Streams, room_for

CPU = torch.device("cpu")


def arrive(model: StreamedModel) -> Activations:
    ids = torch.randint(1, 500, (6, 16), generator=torch.Generator().manual_seed(0))
    states = Activations((6, 16, 64), torch.float32, CPU, 4)
    with torch.no_grad(), model.outside():
        for where in states.batches():
            states.put(where, model.embed(ids[where]))
    return states


def copy_of(states: Activations) -> Activations:
    other = Activations(tuple(states.states.shape), torch.float32, CPU, states.batch)
    other.states.copy_(states.states)
    return other


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3", "gpt2"])
def test_two_halves_make_the_whole(make_model: Callable[..., Path], model_type: str) -> None:
    model = StreamedModel(open_checkpoint(make_model(model_type)), CPU, torch.float32)
    states = arrive(model)
    with torch.no_grad(), model.block(0) as module:
        halves = HalvesFinder().find(model, 0, module, states)
        assert halves is not None
        last = model.architecture.linears[-1][0]
        before, after = (
            [(name, tensor.clone()) for seen in Passage(model, 0, module, copy_of(states), halves=kind).inputs([last])
             for name, tensor in seen.items()]
            for kind in (None, halves)
        )  # fmt: skip
        whole = Passage(model, 0, module, copy_of(states))
        whole.advance(BEHIND)
        steps = Passage(model, 0, module, copy_of(states), halves=halves)
        steps.advance(BETWEEN)
        assert not torch.equal(steps.states.states, whole.states.states)
        between = [seen[last].clone() for seen in steps.inputs([last])]
        assert all(torch.equal(one, two) for (_, one), two in zip(before, between, strict=True))
        assert all(torch.equal(one, two) for (_, one), (_, two) in zip(before, after, strict=True))
        for _ in steps.inputs([last], on_to=BEHIND):
            pass
        steps.advance(BEHIND)  # they are there
        assert torch.equal(steps.states.states, whole.states.states)


def test_other_weights_take_the_same_way(tiny_llama: Path) -> None:
    model = StreamedModel(open_checkpoint(tiny_llama), CPU, torch.float32)
    states = arrive(model)
    other = {name: tensor * 1.25 for name, tensor in model.read_block(0).items()}
    with torch.no_grad():
        with model.block(0, other) as module:
            whole = Passage(model, 0, module, copy_of(states))
            whole.advance(BEHIND)
        with model.block(0) as module:
            halves = HalvesFinder().find(model, 0, module, states)
            steps = Passage(model, 0, module, copy_of(states), other, halves)
            steps.advance(BETWEEN)
            steps.advance(BEHIND)
    assert torch.equal(steps.states.states, whole.states.states)


@pytest.mark.parametrize(
    ("model_type", "closing"),
    [
        ("llama", ("self_attn.o_proj", "mlp.down_proj")),
        ("gpt2", ("attn.c_proj", "mlp.c_proj")),
        ("gemma2", (None, None)),  # norms come after its halves
        ("mixtral", ("self_attn.o_proj", None)),  # many experts end the second half
    ],
)
@pytest.mark.parametrize("little", [0, 1 << 28])
def test_kept_inputs_take_the_states_on(
    make_model: Callable[..., Path],
    model_type: str,
    closing: tuple[str | None, str | None],
    little: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passage, "_LITTLE", little)
    model = StreamedModel(open_checkpoint(make_model(model_type)), CPU, torch.float32)
    states = arrive(model)
    with torch.no_grad(), model.block(0) as module:
        halves = HalvesFinder().find(model, 0, module, states)
        assert halves is not None
        assert halves.closing == closing
        runs: list[int] = []
        module.register_forward_hook(lambda *_: runs.append(1))
        whole, steps = (Passage(model, 0, module, copy_of(states), halves=halves) for _ in range(2))
        for to, layer in zip((BETWEEN, BEHIND), closing, strict=True):
            if layer is None:
                steps.advance(to)
                whole.advance(to)
                continue
            for _ in steps.inputs([layer]):
                pass
            linear = module.get_submodule(layer)
            with torch.no_grad():
                linear.weight.mul_(0.5)  # what quantization does to it meanwhile
            runs.clear()
            steps.advance(to)
            # a second half's inputs are wider: beside the states there is room for some
            assert (len(runs) == 0) == (little > 0 or layer == closing[0])
            whole.advance(to)
            assert torch.equal(steps.states.states, whole.states.states)


@pytest.mark.parametrize(("factor", "to"), [(1.25, BETWEEN), (None, BEHIND)], ids=["other weights", "half of the way"])
def test_kept_inputs_that_lead_elsewhere_are_not_used(tiny_llama: Path, factor: float | None, to: int) -> None:
    model = StreamedModel(open_checkpoint(tiny_llama), CPU, torch.float32)
    states = arrive(model)
    with torch.no_grad(), model.block(0) as module:
        halves = HalvesFinder().find(model, 0, module, states)
        whole, steps = (Passage(model, 0, module, copy_of(states), halves=halves) for _ in range(2))
        weights = None if factor is None else {n: tensor * factor for n, tensor in model.read_block(0).items()}
        for _ in steps.inputs(["self_attn.o_proj"], weights=weights):
            pass
        steps.advance(to)
        whole.advance(to)
    assert torch.equal(steps.states.states, whole.states.states)


def test_a_block_that_adds_both_parts_at_once_has_no_halves(make_model: Callable[..., Path]) -> None:
    folder = make_model("phi")
    model = StreamedModel(open_checkpoint(folder), CPU, torch.float32)
    states = arrive(model)
    with torch.no_grad(), model.block(0) as module:
        assert HalvesFinder().find(model, 0, module, states) is None


def test_layers_outside_any_part_have_no_halves(make_model: Callable[..., Path]) -> None:
    model = StreamedModel(open_checkpoint(make_model("opt", ffn_dim=128, word_embed_proj_dim=64)), CPU, torch.float32)
    states = arrive(model)
    with torch.no_grad(), model.block(0) as module:
        assert HalvesFinder().find(model, 0, module, states) is None


def test_what_is_kept_beside_a_share_of_the_states(tiny_llama: Path, tmp_path: Path) -> None:
    """One of two processes keeps as much as one alone, as long as states may take that much."""
    model = StreamedModel(open_checkpoint(tiny_llama), CPU, torch.float32)
    windows, whole = torch.zeros(6, 16, dtype=torch.long), 6 * 16 * 64 * 4
    for limit, room in ((10 * whole, whole), (2 * whole, whole), (whole + whole // 2, whole // 2)):
        streams = Streams(64, limit, tmp_path)
        share = room_for(model, windows, streams, slice(0, 3), 64, copies=2)
        assert not share.spilled
        assert share.room == room
    assert room_for(model, windows, streams, slice(0, 6), 64, copies=2).spilled
