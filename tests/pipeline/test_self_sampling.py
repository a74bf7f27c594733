"""Text that the model writes: whole documents, and passages of a text that it goes on from."""

from pathlib import Path

import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.progress import Silent
from lowbit.pipeline.self_sampling import Sampling, sample_windows

CPU = torch.device("cpu")


def sampled(model: Path, begun: torch.Tensor | None = None, seed: int = 3) -> torch.Tensor:
    return sample_windows(Sampling(8, 64, seed, begun), open_checkpoint(model), CPU, Silent())


def test_documents_are_sampled_and_the_same_every_time(tiny_llama: Path) -> None:
    found = sampled(tiny_llama)
    assert found.shape == (8, 64)
    assert found.min() >= 0
    assert found.max() < 512
    assert torch.equal(found, sampled(tiny_llama))
    assert not torch.equal(found, sampled(tiny_llama, seed=4))


def test_half_of_the_documents_go_on_from_passages_of_a_text(tiny_llama: Path) -> None:
    text = torch.arange(300).view(3, 100)
    found = sampled(tiny_llama, text)
    # a document here is a window, and a passage a quarter of it
    for window in found[4:]:
        passage = window[:16]
        assert torch.equal(passage, passage[0] + torch.arange(16))
        assert passage[0] // 100 == passage[-1] // 100  # all of it from one window of the text
        assert not torch.equal(window[16:32], passage[-1] + 1 + torch.arange(16))
    assert len({int(window[0]) for window in found[4:]}) > 1
    assert not any(torch.equal(window[:16], window[0] + torch.arange(16)) for window in found[:4])


def test_a_text_shorter_than_a_passage_is_gone_on_from_whole(tiny_llama: Path) -> None:
    found = sampled(tiny_llama, torch.tensor([[7, 8, 9]]))
    assert all(window[:3].tolist() == [7, 8, 9] for window in found[4:])
