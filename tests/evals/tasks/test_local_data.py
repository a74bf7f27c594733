from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.core.errors import EvaluationError, RecipeError
from lowbit.evals.tasks.catalogue import find_leaves, parse_tasks
from lowbit.evals.tasks.local_data import LocalData

pytest.importorskip("lm_eval")
GOOD = '{"subject": "anatomy", "question": "q", "choices": ["a", "b", "c", "d"], "answer": 1}'


def test_reads_the_layouts(task_data: Path) -> None:
    data = LocalData(task_data)
    assert len(data.splits("hellaswag")["validation"]) == 24
    assert {split: len(rows) for split, rows in data.splits("mmlu_virology").items()} == {"dev": 5, "test": 9}
    assert [row["page"].split("=")[1].strip() for row in data.splits("wikitext")["test"]] == ["One", "Two"]
    assert data.digest("mmlu_virology") != data.digest("mmlu_anatomy")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 2 is not JSON"),
        ('["list"]', "line 2 is no JSON object"),
        (GOOD.replace('"answer": 1', '"answer": 4'), "line 2 has 'answer' 4, which is none of its 4 choices"),
        (GOOD.replace('"answer": 1', '"answer": "B"'), "line 2 has 'answer' 'B'"),
        (GOOD.replace(', "d"', ""), "line 2 has 3 choices, not 4"),
        (GOOD.replace("question", "text"), "line 2 has no text 'question'"),
        (GOOD.replace("subject", "topic"), "line 2 has no text 'subject'"),
    ],
)
def test_a_broken_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mmlu.test.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(EvaluationError, match="mmlu.test.jsonl, " + said.replace("[", r"\[")):
        LocalData(tmp_path).splits("mmlu_anatomy")


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no data for hellaswag"):
        LocalData(tmp_path).splits("hellaswag")
    with pytest.raises(EvaluationError, match="no folder"):
        LocalData(tmp_path / "nowhere")
    (tmp_path / "mmlu.test.jsonl").write_text(GOOD)
    with pytest.raises(EvaluationError, match="no items of mmlu_virology"):
        LocalData(tmp_path).splits("mmlu_virology")


def test_names() -> None:
    leaves = find_leaves(parse_tasks("kl,mmlu:2,hellaswag", 7))
    assert len(leaves) == 58
    assert {(leaf.group, leaf.shots, leaf.limit, leaf.primary) for leaf in leaves} == {
        ("mmlu", 5, 2, "acc"),
        ("hellaswag", 0, 7, "acc_norm"),
    }
    assert find_leaves(parse_tasks("gsm8k", None))[0].shots == 5
    assert find_leaves(parse_tasks("arc_challenge", None), shots=25)[0].shots == 25
    assert not find_leaves(parse_tasks("wikitext", None))[0].higher_is_better
    for wrong, said in (("", "no task"), ("mmlu:x", "no number"), ("mmlu,mmlu", "twice")):
        with pytest.raises(RecipeError, match=said):
            parse_tasks(wrong, None)
    with pytest.raises(RecipeError, match="part of two"):
        find_leaves(parse_tasks("mmlu,mmlu_anatomy", None))
