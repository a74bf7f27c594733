"""Text that the model writes: whole documents, and passages of a text that it goes on from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.progress import Silent
from lowbit.pipeline.self_sampling import Sampling, Shelves, kept_samples, sample_windows

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


class Counting(Silent):
    """How often a model was asked to write."""

    times = 0

    def start(self, what: str, total: int) -> None:
        self.times += what == "sample"


def test_what_was_written_once_is_on_the_shelf(tiny_llama: Path, tmp_path: Path) -> None:
    progress, library, checkpoint = Counting(), tmp_path / "library", open_checkpoint(tiny_llama)

    def kept(work: str, **changed: Any) -> torch.Tensor:
        wanted = replace(Sampling(4, 32, 3), **changed)
        return kept_samples(wanted, "own", Shelves(tmp_path / work, library), checkpoint, CPU, progress)

    first = kept("a")
    assert torch.equal(first, sample_windows(Sampling(4, 32, 3), checkpoint, CPU, Silent()))
    assert torch.equal(kept("b"), first)
    assert progress.times == 1
    others = ({"seed": 4}, {"count": 5}, {"begun": first})
    for number, changed in enumerate(others):
        assert not torch.equal(kept(f"c{number}", **changed)[:4], first)
        assert progress.times == 2 + number
    min(library.iterdir()).write_bytes(b"damaged")
    for number, changed in enumerate(({}, *others)):
        kept(f"d{number}", **changed)
    assert progress.times == 5


def test_a_library_that_cannot_be_written_is_done_without(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "library").write_text("a file")
    wanted, progress = Sampling(4, 32, 3), Counting()
    places = "own", Shelves(tmp_path, tmp_path / "library")
    first = kept_samples(wanted, *places, open_checkpoint(tiny_llama), CPU, progress)
    assert torch.equal(kept_samples(wanted, *places, open_checkpoint(tiny_llama), CPU, progress), first)
    assert progress.times == 1
