"""Packed rows against one prompt at a time: the same scores, with fewer tokens computed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.tokenizer import load_tokenizer
from lowbit.evals.tasks.catalogue import build, find_leaves, parse_tasks
from lowbit.evals.tasks.engines import transformers_engine
from lowbit.evals.tasks.harness import LeafResult, run_leaf
from lowbit.evals.tasks.local_data import LocalData
from lowbit.evals.tasks.packed_scores import heeds_packing, packed_scores
from lowbit.evals.tasks.packing import Prompt, pack

LONGEST = 96


def requests() -> list[tuple[list[int], list[int]]]:
    """Questions with several endings, one-token continuations of one context, examples before every question, one prompt
    twice, and a prompt that is longer than the model's positions."""
    rng = random.Random(1)

    def some(count: int) -> list[int]:
        return [rng.randrange(1, 500) for _ in range(count)]

    found: list[tuple[list[int], list[int]]] = []
    for _ in range(6):
        context = some(rng.randint(5, 20))
        found += [(context, some(rng.randint(1, 6))) for _ in range(4)]
    examples = some(40)
    for _ in range(7):
        question = examples + some(9)
        found += [(question, [letter]) for letter in (3, 4, 5, 6)]
    found += [found[0], (some(LONGEST + 30), some(5)), ([7], some(60))]
    return found


def one_by_one(model: torch.nn.Module, asked: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    results = []
    for context, continuation in asked:
        tokens = (context + continuation)[-(LONGEST + 1) :]
        logs = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)[-len(continuation) :]
        each = [float(logs[i, token]) for i, token in enumerate(continuation)]
        greedy = logs.argmax(-1).tolist() == continuation
        results.append((sum(each), greedy))
    return results


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("row_tokens", [1, 60, 1000])
def test_the_same_scores(family: str, row_tokens: int, make_model: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(family), dtype=torch.float32).eval()
    asked = requests()
    with torch.no_grad():
        assert heeds_packing(model, asked, LONGEST)
        expected = one_by_one(model, asked)
        found = packed_scores(model, asked, longest=LONGEST, row_tokens=row_tokens)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4, abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", {"sliding_window": 16}), ("bloom", {"n_head": 4}), ("mamba", {}), ("gemma3_text", {"head_dim": 16})],
)
def test_models_that_would_not_heed_it(
    family: str, changes: dict[str, object], make_model: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(family, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        assert not heeds_packing(model, requests(), LONGEST)


def test_a_model_that_counts_positions_itself_is_found_out(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    really = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **named: really(*args, **{**named, "position_ids": None}))
    with torch.no_grad():
        assert not heeds_packing(model, requests(), LONGEST)


def test_what_is_common_is_there_once() -> None:
    asked = [Prompt((*range(50), 100 + i, 7), 51) for i in range(10)] + [Prompt((200 + i,) * 9, 4) for i in range(5)]
    rows = pack(asked, 120)
    assert sum(len(row.tokens) for row in rows) == 50 + 10 * 2 + 5 * 9
    assert sorted(index for row in rows for index in row.places) == list(range(15))
    for row in rows:
        sees = row.mask()
        for index, (start, stop) in row.places.items():
            last = stop - 1
            seen = [row.tokens[i] for i in sees[last].nonzero()[:, 0].tolist()]
            assert tuple(seen) == asked[index].tokens
            positions = [row.positions[i] for i in sees[last].nonzero()[:, 0].tolist()]
            assert positions == list(range(len(seen)))
            assert stop - start == len(asked[index].tokens) - asked[index].scored


def test_tasks_come_out_alike(tiny_llama: Path, task_data: Path) -> None:
    pytest.importorskip("lm_eval")
    checkpoint = open_checkpoint(tiny_llama)
    leaves = find_leaves(parse_tasks("hellaswag,mmlu_virology,wikitext", None))
    data = LocalData(task_data)
    runs: list[list[LeafResult]] = []
    for packed in (False, True):
        device, tokenizer = torch.device("cpu"), load_tokenizer(checkpoint)
        with transformers_engine(checkpoint, tokenizer, device, torch.float32, batch_size=4, packed=packed) as engine:
            runs.append([run_leaf(build(leaf, data), leaf, engine) for leaf in leaves])
            assert engine.packs is packed
    for plain, packed_result in zip(*runs, strict=True):
        assert packed_result.answers == plain.answers
        assert packed_result.items == pytest.approx(plain.items, rel=1e-5)
