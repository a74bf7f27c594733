"""What can be recorded as a CUDA graph, and that recording changes nothing but the time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.api.run import Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.recording import Recorded, WatchesForQuestions
from lowbit.core.streamed_model import StreamedModel

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
TEXT = {"dataset": "pydoc", "num_samples": 24, "seq_len": 64}
TRAINED = {**TEXT, "method": "autoround", "bits": 3, "group_size": 32, "tune": {"steps": 20}}


@pytest.mark.parametrize(
    "question",
    [
        lambda one: one.nonzero(),
        lambda one: one.max().item(),
        lambda one: one[one > 0],
        lambda one: bool((one > 0).all()),
    ],
    ids=["nonzero", "item", "mask", "bool"],
)
def test_what_depends_on_the_data_is_seen(question: Callable[[torch.Tensor], object]) -> None:
    one = torch.randn(4, 4)
    with WatchesForQuestions() as watch:
        question(one)
    assert watch.seen


@pytest.mark.parametrize("size", [(), (3,)], ids=["scalar", "vector"])
def test_what_is_moved_to_another_device_is_seen(size: tuple[int, ...]) -> None:
    one = torch.ones(size)
    with WatchesForQuestions() as watch:
        one.to("meta")  # stands in for a GPU
    assert watch.seen


def test_plain_arithmetic_is_no_question() -> None:
    one = torch.randn(4, 8, requires_grad=True)
    with WatchesForQuestions() as watch:
        loss = torch.nn.functional.scaled_dot_product_attention(*[(one @ one.T)[None, None]] * 3).square()
        torch.autograd.grad(torch.where(loss > 1, loss, loss.median()).mean() * torch.tensor(2.0), one)
        torch.ones(3, device="meta") * torch.tensor(2.0)
    assert not watch.seen


def test_a_whole_block_of_a_model_asks_nothing_and_one_with_experts_does(
    tiny_llama: Path, make_model: Callable[..., Path]
) -> None:
    experts = make_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    for path, asks in ((tiny_llama, False), (experts, True)):
        model = StreamedModel(open_checkpoint(path), torch.device("cpu"), torch.float32)
        with model.outside(), model.block(0) as block:
            hidden = model.embed(torch.arange(32).view(2, 16))
            with WatchesForQuestions() as watch:
                model.run_block(0, block, hidden)
        assert watch.seen == asks


@needs_gpu
def test_a_scalar_made_on_a_gpu_is_seen() -> None:
    with WatchesForQuestions() as watch:
        torch.tensor(2.0, device="cuda")
    assert watch.seen


@needs_gpu
def test_a_recorded_function_gives_what_the_plain_one_does() -> None:
    weight = torch.randn(32, 32, device="cuda")

    def step(one: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf = one.clone().requires_grad_()
        with torch.enable_grad():
            return (torch.autograd.grad((leaf @ weight).square().mean(), leaf)[0],)

    recorded = Recorded(step)
    for seed in range(6):
        given = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)).cuda()
        assert torch.equal(recorded(given)[0], step(given)[0])


@needs_gpu
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_training_gives_the_same_bytes_recorded_or_not(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Experts, which are picked token by token, are trained without being recorded."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "mixtral" else {}
    model = make_model(model_type, **sizes)
    recorded: list[object] = []
    capture = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (recorded.append(graph), capture(graph))[1])
    made, replays = [], []
    for calls in (16, 10**9):
        for loop in ("lowbit.methods.learning", "lowbit.pipeline.tune"):
            monkeypatch.setattr(f"{loop}.MANY_CALLS", calls)
        recorded.clear()
        output = tmp_path / str(calls)
        lowbit.quantize(model, output=output, settings=Settings(device="cuda", verify=False), **TRAINED)
        made.append((output / "model.safetensors").read_bytes())
        replays.append(len(recorded))
    assert (replays[0] > 100) == (model_type == "llama")
    assert replays[1] == 0
    assert made[0] == made[1]
