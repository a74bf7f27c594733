"""lowbit's numbers are those of lm-eval's own `hf` model on definitions written here, to the last digit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.tokenizer import load_tokenizer
from lowbit.evals.statistics import standard_error
from lowbit.evals.tasks.catalogue import build, find_leaves, parse_tasks
from lowbit.evals.tasks.engines import transformers_engine
from lowbit.evals.tasks.harness import LeafResult, run_leaf, together
from lowbit.evals.tasks.local_data import LocalData

lm_eval = pytest.importorskip("lm_eval")

SWAG = {
    "task": "swag_here", "dataset_path": "json", "output_type": "multiple_choice", "validation_split": "validation",
    "doc_to_text": "{{ctx}}", "doc_to_choice": "endings", "doc_to_target": "label",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}  # fmt: skip
MMLU = {
    "task": "mmlu_here", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
    "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": 5,
    "description": "The following are multiple choice questions (with answers) about virology.\n\n",
    "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.fixture(scope="module")
def ours(tiny_llama: Path, task_data: Path) -> dict[str, LeafResult]:
    checkpoint = open_checkpoint(tiny_llama)
    leaves = find_leaves(parse_tasks("hellaswag,mmlu_virology,wikitext", None))
    data = LocalData(task_data)
    with transformers_engine(
        checkpoint, load_tokenizer(checkpoint), torch.device("cpu"), torch.float32, batch_size=4
    ) as engine:
        return {leaf.name: run_leaf(build(leaf, data), leaf, engine) for leaf in leaves}


def test_equal_to_the_last_digit(
    ours: dict[str, LeafResult], tiny_llama: Path, task_data: Path, tmp_path: Path
) -> None:
    from lm_eval.tasks import TaskManager

    swag = {**SWAG, "dataset_kwargs": {"data_files": {"validation": str(task_data / "hellaswag.validation.jsonl")}}}
    files = {}
    for split in ("dev", "test"):
        rows = [json.loads(line) for line in (task_data / f"mmlu.{split}.jsonl").read_text().strip().split("\n")]
        files[split] = str(tmp_path / f"{split}.jsonl")
        own = [json.dumps(row) for row in rows if row["subject"] == "virology"]
        Path(files[split]).write_text("\n".join(own))
    mmlu = {**MMLU, "dataset_kwargs": {"data_files": files}}
    done = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tiny_llama},dtype=float32",
        tasks=[swag, mmlu],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=100,
    )
    for task, name in (("swag_here", "hellaswag"), ("mmlu_here", "mmlu_virology")):
        theirs = done["results"][task]
        for metric, score in ours[name].scores.items():
            assert score == theirs[f"{metric},none"], (name, metric)
        primary = ours[name].metric
        assert standard_error(ours[name].items) == pytest.approx(theirs[f"{primary}_stderr,none"], rel=1e-12)
        if name == "mmlu_virology":
            answers = [max(range(4), key=lambda i, s=sample: s["resps"][i][0][0]) for sample in done["samples"][task]]
            assert ours[name].answers == answers


def test_scores_follow_from_the_items(ours: dict[str, LeafResult]) -> None:
    for name, result in ours.items():
        score = together(name, [result])
        assert score.score == pytest.approx(result.scores[result.metric], rel=1e-9)
        assert score.n == len(result.items)
    assert together("wikitext", [ours["wikitext"]]).metric == "word_perplexity"


def test_against_itself_nothing_changed(ours: dict[str, LeafResult]) -> None:
    for name, result in ours.items():
        score = together(name, [result], [result])
        assert score.against is not None
        assert score.against.difference == 0
        assert score.against.recovery == 100
        assert score.against.verdict == "indistinguishable"
        assert score.changed_answers in (0, None)


def test_leaves_together_count_items() -> None:
    def leaf(name: str, items: list[float]) -> LeafResult:
        return LeafResult(name, "acc", True, 5, {"acc": sum(items) / len(items)}, items, [0] * len(items))

    one, two = leaf("a", [1.0] * 9 + [0.0]), leaf("b", [0.0] * 10 + [1.0] * 20)
    whole = together("both", [one, two], [one, one and leaf("b", [0.0] * 30)])
    assert whole.score == pytest.approx(29 / 40)
    assert whole.base_score == pytest.approx(9 / 40)
    assert whole.against is not None
    assert whole.against.flips == pytest.approx(0.5)
    assert whole.leaves == {"a": 0.9, "b": pytest.approx(2 / 3)}


def test_one_item_a_leaf_has_a_spread_all_the_same() -> None:
    leaves = [LeafResult(str(i), "acc", True, 5, {}, [float(i % 2)], [0]) for i in range(20)]
    assert together("many", leaves).error == pytest.approx(standard_error([float(i % 2) for i in range(20)]))


def test_perplexities_compare_as_ratios() -> None:
    import math

    def leaf(nll: list[float]) -> LeafResult:
        return LeafResult("wikitext", "word_perplexity", False, 0, {}, nll, [None] * len(nll))

    base = [2.0 + 0.1 * (i % 5) for i in range(50)]
    worse = together("wikitext", [leaf([value + 0.1 + 0.01 * (i % 3) for i, value in enumerate(base)])], [leaf(base)])
    assert worse.base_score == pytest.approx(math.exp(2.2))
    assert worse.against is not None
    assert worse.against.difference == pytest.approx(worse.score - math.exp(2.2))
    assert worse.against.low < worse.against.difference < worse.against.high
    assert worse.against.recovery == pytest.approx(100 * math.exp(2.2) / worse.score)
    assert worse.against.verdict == "significant loss"
