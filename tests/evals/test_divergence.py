"""Against the obvious computation with transformers; the base's cached states change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.progress import Silent
from lowbit.core.streamed_model import StreamedModel
from lowbit.evals.divergence import measure, measure_details


@pytest.fixture(scope="module")
def pair(make_model: Callable[..., Path]) -> tuple[Path, Path]:
    return make_model(seed=0), make_model(seed=1)


def streamed(folder: Path) -> StreamedModel:
    return StreamedModel(open_checkpoint(folder), torch.device("cpu"), torch.float32)


WINDOWS = torch.randint(0, 512, (3, 50), generator=torch.Generator().manual_seed(0))


def test_measures_what_the_definition_says(pair: tuple[Path, Path]) -> None:
    base, other = pair
    with torch.no_grad():
        logs = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(WINDOWS).logits[:, :-1].log_softmax(-1)
            for folder in pair
        ]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).flatten()
    nll = -logs[1].gather(2, WINDOWS[:, 1:, None]).flatten()
    details = measure_details(streamed(other), WINDOWS, Silent(), base=streamed(base))
    found = details.measurement
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(kl.double().quantile(0.99).item(), rel=1e-4)
    assert found.perplexity == pytest.approx(nll.mean().exp().item(), rel=1e-4)
    assert found.top1 == pytest.approx((logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean().item())
    assert sum(details.histogram) == 3 * 49
    worst = details.worst[0]
    assert worst.window * 49 + worst.position == int(kl.argmax())
    assert worst.kl == pytest.approx(kl.max().item(), rel=1e-4)
    assert worst.base_choice == int(logs[0].flatten(0, 1)[kl.argmax()].argmax())
    assert worst.probability == pytest.approx(logs[1].flatten(0, 1)[kl.argmax()].max().exp().item(), rel=1e-3)


def test_cached_base_is_not_run_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = pair
    plain = measure(streamed(other), WINDOWS, Silent(), base=streamed(base))
    first = measure(streamed(other), WINDOWS, Silent(), base=streamed(base), cache=tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) == 1
    again = streamed(base)
    again.run_block = None  # type: ignore[method-assign,assignment]  # would fail if it were called
    second = measure(streamed(other), WINDOWS, Silent(), base=again, cache=tmp_path)
    assert plain == first == second
    measure(streamed(other), WINDOWS[:2], Silent(), base=streamed(base), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_interrupted_base_pass_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = streamed(pair[0])

    def broken(*_: object, **__: object) -> torch.Tensor:
        raise KeyboardInterrupt

    base.run_block = broken  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        measure(streamed(pair[1]), WINDOWS, Silent(), base=base, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_against_itself(pair: tuple[Path, Path]) -> None:
    same = measure(streamed(pair[0]), WINDOWS, Silent(), base=streamed(pair[0]))
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1 == 1.0


def test_a_model_against_itself_is_run_once(pair: tuple[Path, Path]) -> None:
    base, again = streamed(pair[0]), streamed(pair[0])
    again.run_block = None  # type: ignore[method-assign,assignment]  # would fail if it were called
    found = measure(again, WINDOWS, Silent(), base=base)
    assert (found.kl, found.top1) == (0, 1)
    assert found.perplexity == found.base_perplexity
