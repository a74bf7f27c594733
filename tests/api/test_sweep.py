from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowbit.api import sweep as module
from lowbit.api.evaluation import Evaluation
from lowbit.api.quantize import quantize
from lowbit.api.sweep import Sweep, sweep
from lowbit.core.errors import RecipeError
from tests.gguf_files import write_gguf
from tests.task_data import write_task_data

METHODS = ("fp16", "rtn", "gptq")


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    evaluation = Evaluation(windows=2, context=32, device="cpu")
    return Sweep(METHODS, num_samples=4, seq_len=64, group_size=64, evaluation=evaluation)


def test_makes_and_measures_all_and_continues(
    wanted: Sweep, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = sweep(tiny_llama, tmp_path / "out", wanted, cache=tmp_path / "cache")
    assert [path.name for path in done.artifacts] == list(METHODS)
    assert not done.failed
    runs = {path.name: json.loads((path / "lowbit-eval.json").read_text()) for path in done.artifacts}
    assert runs["fp16"]["text"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < runs["gptq"]["text"]["kl"] < runs["rtn"]["text"]["kl"]
    assert "held out" in runs["gptq"]["text"]["dataset"]
    record = json.loads((tmp_path / "out/gptq/lowbit.json").read_text())
    assert record["verification"]["kl"] == runs["gptq"]["text"]["kl"]
    assert "KL divergence" in (tmp_path / "out/gptq/README.md").read_text()
    assert len(list((tmp_path / "cache/states").iterdir())) == 1  # one base pass served all

    alone = quantize(
        tiny_llama, output=tmp_path / "alone", method="gptq", dataset="pydoc", num_samples=4, seq_len=64, group_size=64
    )
    assert (alone.path / "model.safetensors").read_bytes() == (tmp_path / "out/gptq/model.safetensors").read_bytes()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(module, "quantize", never)
    monkeypatch.setattr(module, "evaluate_run", never)
    again = sweep(tiny_llama, tmp_path / "out", wanted, cache=tmp_path / "cache")
    assert [path.name for path in again.artifacts] == list(METHODS)
    changed = sweep(tiny_llama, tmp_path / "out", replace(wanted, num_samples=5), cache=tmp_path / "cache")
    assert "another recipe" in changed.failed["gptq"]


def test_a_gguf_file_has_the_bytes_that_it_has_alone(wanted: Sweep, tiny_llama: Path, tmp_path: Path) -> None:
    model = write_gguf(tiny_llama, tmp_path / "tiny.gguf")
    options = {"refine": "imatrix"}
    asked = replace(wanted, methods=("q4_k_m",), options={"q4_k_m": options})
    done = sweep(model, tmp_path / "out", asked, cache=tmp_path / "cache")
    assert [path.name for path in done.artifacts] == ["q4_k_m.gguf"]
    text = {"dataset": "pydoc", "num_samples": 4, "seq_len": 64}
    alone = quantize(model, output=tmp_path / "alone.gguf", method="q4_k_m", options=options, **text)
    assert alone.path.read_bytes() == done.artifacts[0].read_bytes()


def test_one_failure_does_not_stop_the_others(wanted: Sweep, tiny_llama: Path, tmp_path: Path) -> None:
    done = sweep(
        tiny_llama, tmp_path / "out", replace(wanted, methods=("gptq", "rtn"), group_size=48), cache=tmp_path / "cache"
    )
    assert set(done.failed) == {"gptq", "rtn"}
    assert "does not divide" in done.failed["gptq"]
    with pytest.raises(RecipeError, match="did you mean 'gptq'"):
        sweep(tiny_llama, tmp_path / "out", replace(wanted, methods=("gtpq",)), cache=tmp_path / "cache")


def test_garbage_is_no_artifact(
    wanted: Sweep, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = module.evaluate_run

    def broken(*arguments: Any, **named: Any) -> dict[str, Any]:
        run = really(*arguments, **named)
        run["text"] |= {"kl": 9.0, "top1": 0.01}
        return run

    monkeypatch.setattr(module, "evaluate_run", broken)
    done = sweep(tiny_llama, tmp_path / "out", replace(wanted, methods=("rtn",)), cache=tmp_path / "cache")
    assert "does not speak like its base" in done.failed["rtn"]
    assert not (tmp_path / "out/rtn").exists()


def test_tasks_are_run_once_for_the_base(wanted: Sweep, tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = write_task_data(tmp_path)
    evaluation = replace(wanted.evaluation, tasks="hellaswag:4", data=data, dtype="float32")
    sweep(tiny_llama, tmp_path / "out", replace(wanted, evaluation=evaluation), cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache/evaluations").iterdir())) == 3  # base and fp16 in one, rtn, gptq
