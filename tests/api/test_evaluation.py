"""Whole evaluations of a tiny model: what a run holds, what is kept, what is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.api import task_results
from lowbit.api.evaluation import Evaluation, evaluate_run
from lowbit.api.runs import merged, read_run, run_file, write_run
from lowbit.core.errors import EvaluationError, LowbitError, RecipeError
from tests.task_data import write_task_data

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pair(make_model: Callable[..., Path]) -> tuple[Path, Path]:
    return make_model(seed=0), make_model(seed=1)


def small(data: Path, tasks: str, **changes: Any) -> Evaluation:
    return Evaluation(tasks=tasks, limit=6, data=data, windows=2, context=32, dtype="float32", device="cpu", **changes)


def test_a_run_holds_scores_text_and_memory(pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    run = evaluate_run(pair[1], base=pair[0], wanted=small(data, "hellaswag,mmlu_virology,kl"), cache=tmp_path)
    task = run["tasks"]["hellaswag"]
    assert (task["n"], task["metric"], run["tasks"]["mmlu_virology"]["shots"]) == (6, "acc_norm", 5)
    assert task["against"]["difference"] == pytest.approx(task["score"] - task["base_score"])
    assert run["text"]["kl"] > 0
    assert "full" in run["text"]["base_states"]
    worst = run["text"]["worst"][0]
    assert worst["kl"] >= run["text"]["kl_p99"]
    assert isinstance(worst["before"] + worst["token"] + worst["choice"], str)
    stored = sum(file.stat().st_size for file in pair[1].glob("*.safetensors"))
    assert 0 < run["memory"]["total"] <= stored
    assert run["memory"]["cache"] == 2 * 3 * 2 * 16 * 4096 * 2
    json.dumps(run, allow_nan=False)


def test_finished_tasks_are_kept(
    pair: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    really = task_results.run_leaf

    def counted(task: Any, leaf: Any, model: Any) -> Any:
        ran.append(leaf.name)
        if leaf.name == "mmlu_virology" and len(ran) == 2:
            raise KeyboardInterrupt
        return really(task, leaf, model)

    monkeypatch.setattr(task_results, "run_leaf", counted)
    wanted = small(data, "hellaswag,mmlu_virology")
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(pair[1], base=pair[0], wanted=wanted, cache=tmp_path)
    first = evaluate_run(pair[1], base=pair[0], wanted=wanted, cache=tmp_path)
    assert ran == ["hellaswag", "mmlu_virology", "mmlu_virology", "hellaswag", "mmlu_virology"]
    again = evaluate_run(pair[1], base=pair[0], wanted=wanted, cache=tmp_path)
    assert len(ran) == 5
    assert again["tasks"] == first["tasks"]
    evaluate_run(pair[0], wanted=wanted, cache=tmp_path)  # the base on its own is known as well
    assert len(ran) == 5
    evaluate_run(pair[0], wanted=small(data, "hellaswag", rerun=True), cache=tmp_path)
    evaluate_run(pair[0], wanted=small(data, "hellaswag", shots=2), cache=tmp_path)
    assert len(ran) == 7


def test_changed_data_is_run_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    data = write_task_data(tmp_path)
    wanted = small(data, "mmlu_virology")
    first = evaluate_run(pair[0], wanted=wanted, cache=tmp_path / "cache")
    file = data / "mmlu.test.jsonl"
    file.write_text(file.read_text().replace('"answer": 0', '"answer": 1'))
    second = evaluate_run(pair[0], wanted=wanted, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache/evaluations").iterdir())) == 2
    assert first["tasks"]["mmlu_virology"]["n"] == second["tasks"]["mmlu_virology"]["n"]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"tasks": "arc_easy"}, EvaluationError, "no data for arc_easy"),
        ({"runtime": "vlm"}, RecipeError, "did you mean 'vllm'"),
        ({"runtime": "llama.cpp"}, RecipeError, "reads .gguf"),
        ({"runtime": "http://127.0.0.1:9"}, EvaluationError, "does not answer"),
        ({"dtype": "int7"}, RecipeError, "unknown"),
    ],
)
def test_errors(
    changes: dict[str, Any], error: type[LowbitError], said: str, pair: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    wanted = replace(small(data, "hellaswag"), **changes)
    with pytest.raises(error, match=said):
        evaluate_run(pair[0], wanted=wanted, cache=tmp_path)


def test_a_server_alone_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="tokenizer"):
        evaluate_run("http://127.0.0.1:9", wanted=Evaluation(tasks="hellaswag"), cache=tmp_path)


def test_runs_join(tmp_path: Path) -> None:
    against = {"against": {"verdict": "broken"}}
    before = {"artifact": "a", "base": "b", "runtime": "transformers", "tasks": {"x": against}, "text": {"kl": 1}}
    now = {"artifact": "a", "base": "b", "runtime": "transformers", "tasks": {"y": {}}, "seconds": 1}
    whole = merged(before, now)
    assert (set(whole["tasks"]), whole["text"], whole["verdict"]) == ({"x", "y"}, {"kl": 1}, "broken")
    assert merged({**before, "base": "c"}, now) == now
    assert set(merged({**before, "runtime": "vllm"}, now)["tasks"]) == {"y"}
    write_run(whole, tmp_path / "deep" / "run.json")
    assert read_run(tmp_path / "deep" / "run.json") == whole
    assert run_file(Path("m.gguf")).name == "m.lowbit-eval.json"
