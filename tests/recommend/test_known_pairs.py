"""Known pairs of model and hardware come out as people who know them would say, and for the right reason."""

from __future__ import annotations

from typing import Any

import pytest

from lowbit.api.recommend import next_commands, recommend
from lowbit.recommend.candidates import Wishes
from lowbit.recommend.engine import Recommendation
from lowbit.recommend.guide import scenarios
from lowbit.recommend.memory import Load
from tests.recommend.models import write_config

GIB = 2**30
# model, hardware, wishes, best methods (any of), a word of its reason, method ruled out and a word of why (or None)
PAIRS: list[tuple[str, str, dict[str, Any], tuple[str, ...], str, str | None, str]] = [
    ("llama-2-7b", "t4", {}, ("awq", "gptq"), "low-end GPU", "bf16", "no bfloat16"),
    ("llama-2-7b", "t4", {}, ("awq", "gptq"), "4 bits", "fp16", "needs 16."),
    ("llama-2-7b", "t4", {}, ("awq", "gptq"), "4 bits", "fp8", "8.9"),
    ("llama-2-7b", "h100", {"min_recovery": 99}, ("fp8",), "high accuracy", "awq", "98.9%"),
    ("llama-2-7b", "h100", {}, ("awq",), "production GPU", "nvfp4", "10.0"),
    ("llama-2-7b", "v100", {}, ("gptq",), "production GPU", "awq", "AWQ-Marlin 8.0"),
    ("llama-2-7b", "v100", {}, ("gptq",), "production GPU", "w8a8", "Turing"),
    ("llama-2-7b", "v100-16g", {}, ("gptq",), "low-end", "awq", "take GPTQ"),
    ("llama-2-7b", "cpu:8c,16g", {}, ("q4_k_m",), "CPU", "bf16", "needs"),
    ("llama-2-7b", "cpu:8c,16g,avx2", {}, ("q4_k_m",), "CPU", "awq", "AVX-512"),
    ("llama-2-7b", "board:4g", {"context": 512}, ("q3_k_s",), "edge", "q4_k_m", "needs"),
    ("llama-3.2-3b", "board:4g", {"context": 2048}, ("q3_k_s",), "edge", "q8_0", "needs"),
    ("llama-3.2-3b", "raspberrypi4", {"context": 2048}, ("q3_k_s",), "edge", None, ""),
    ("llama-3.2-1b", "raspberrypi5", {}, ("q3_k_s",), "edge", None, ""),
    ("llama-3.1-70b", "rtx4090x2", {}, ("awq", "gptq"), "4 bits", "fp8", "needs"),
    ("llama-3.1-70b", "gpu:24g,cc8.6", {}, (), "", "awq", "needs"),
    ("llama-3.1-70b", "h100x2", {"min_recovery": 99.5}, ("fp8",), "high accuracy", "awq", "99.2%"),
    ("llama-3.1-70b", "h100x4", {"min_recovery": 99.95}, ("bf16",), "", "fp8", "asked for"),
    ("llama-3.1-8b", "b200", {"scenario": "high-accuracy"}, ("fp8",), "high accuracy", None, ""),
    ("llama-3.1-8b", "a100", {"min_recovery": 99}, ("int8_sq",), "INT8", "fp8", "8.9"),
    ("llama-3.1-8b", "rtx3060", {}, ("awq", "gptq"), "low-end", "bf16", "needs"),
    ("llama-3.1-8b", "rtx4090", {"min_recovery": 99}, ("fp8",), "high accuracy", "q4_k_m", "98.6%"),
    ("llama-3.1-8b", "mi300x", {}, ("fp8",), "FP8", "awq", "AMD"),
    ("llama-3.1-8b", "rx7900xtx", {}, ("q4_k_m",), "any GPU", "fp8", "RDNA 4"),
    ("llama-3.1-8b", "arc-a770", {}, ("awq",), "low-end", "fp8", "Intel"),
    ("llama-3.1-8b", "m2", {}, ("q4_k_m",), "CPU", "awq", "Metal"),
    ("llama-3.1-8b", "gtx1080ti", {}, ("q4_k_m",), "any GPU", "gptq", "vLLM needs compute capability 7.0"),
    ("llama-3.1-8b", "cpu:32c,128g,avx512", {"min_recovery": 99}, ("int8_sq",), "high accuracy", "int8", "CPU kernel"),
    ("llama-3.1-8b", "cpu:32c,128g,avx2", {"min_recovery": 99}, ("q8_0",), "high accuracy", "fp8", "AVX-512"),
    ("llama-3.1-8b", "xeon-8480", {}, ("q4_k_m",), "CPU", "nf4", "NVIDIA"),
    ("llama-3.1-8b", "epyc-9654", {}, ("q4_k_m",), "CPU", "fp8", "no FP8"),
    ("llama-2-13b", "rtx4060ti-16g", {}, ("awq", "gptq"), "low-end", "fp8", "needs"),
    ("llama-2-13b", "h100x3", {}, ("awq",), "production", "nvfp4", "10.0"),
    ("mixtral-8x7b", "rtx4090x2", {}, ("awq", "gptq"), "4 bits", "fp8", "needs"),
    ("qwen2.5-0.5b", "cpu:4c,8g", {"min_recovery": 98}, ("q5_k_m", "q6_k", "q8_0"), "", "q4_k_m", "accuracy"),
]  # fmt: skip


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("configs")
    none = folder / "no-records.jsonl"
    answers: dict[str, Recommendation] = {}

    def asked(model: str, hardware: str, wishes: dict[str, Any]) -> Recommendation:
        key = f"{model} {hardware} {wishes}"
        if key not in answers:
            given = dict(wishes)
            load = Load(given.pop("context", 4096), given.pop("concurrency", 1))
            scenario = given.pop("scenario", None)
            target = write_config(folder, model)
            answers[key] = recommend(
                target, hardware=hardware, scenario=scenario, wishes=Wishes(load, **given), records=none
            )
        return answers[key]

    return asked


@pytest.mark.parametrize(("model", "hardware", "wishes", "best", "reason", "out", "why"), PAIRS)
def test_known_pair(
    ask: Any, model: str, hardware: str, wishes: dict[str, Any], best: tuple[str, ...], reason: str, out: str, why: str
) -> None:
    answer = ask(model, hardware, wishes)
    assert answer.possible == bool(best)
    first = answer.ranked[0]
    if best:
        assert first.option.method in best
        assert first.fits
        assert not first.misses
        assert reason in " ".join(text.en for text in first.reasons)
    if out is not None:
        against = [ruled.text.en for ruled in answer.ruled_out if ruled.method == out]
        against += [text.en for c in answer.ranked if c.option.method == out for text in c.misses]
        assert any(why in text for text in against), (against, [c.option.method for c in answer.ranked])


def test_two_gpus_of_24_gib_hold_70b_for_one_reader_not_for_eight(ask: Any) -> None:
    one, eight = ask("llama-3.1-70b", "rtx4090x2", {}), ask("llama-3.1-70b", "rtx4090x2", {"concurrency": 8})
    assert one.ranked[0].concurrency >= 1
    assert all(candidate.option.method in ("q2_k", "q3_k_s") for candidate in eight.ranked if candidate.fits)
    assert "needs" in next(r.text.en for r in eight.ruled_out if r.method == "awq")


def test_what_does_not_fit_says_what_would(ask: Any) -> None:
    answer = ask("llama-3.1-70b", "rtx4090", {})
    assert not answer.possible
    assert len(answer.ranked) == 4
    assert answer.ranked[0].option.method == "q2_k"
    assert "2 x GeForce RTX 4090" in answer.advice[0].en
    assert all(text.zh and text.zh != text.en for text in answer.advice)
    board = ask("llama-2-7b", "board:4g", {})
    assert not board.possible
    assert "a machine with" in board.advice[-1].en


def test_impossible_wishes_get_the_nearest(ask: Any) -> None:
    fast = ask("llama-2-7b", "cpu:8c,16g", {"min_tokens_per_s": 100})
    assert not fast.possible
    assert "508 GB/s" in fast.advice[0].en or "GB/s of memory bandwidth" in fast.advice[0].en
    # the fastest come first
    speeds = [candidate.speed.decode for candidate in fast.ranked]
    assert speeds == sorted(speeds, reverse=True)
    exact = ask("llama-2-7b", "t4", {"min_recovery": 99.99})
    assert not exact.possible
    assert "the most that fits" in exact.advice[-1].en
    small = ask("llama-2-7b", "cpu:8c,16g", {"max_memory": 4 * GIB})
    assert small.possible == any(candidate.fits for candidate in small.ranked)
    none = ask("llama-2-7b", "cpu:8c,16g", {"max_memory": GIB})
    assert "--max-memory" in " ".join(text.en for text in none.advice)
    long = ask("llama-2-7b", "h100", {"context": 32768})
    assert "4096 positions" in long.advice[0].en
    assert long.ranked[0].parts.cache == 2 * GIB


def test_what_is_said_of_the_model(ask: Any) -> None:
    small = ask("qwen2.5-0.5b", "rtx4090", {})
    assert "embedding and head" in " ".join(text.en for text in small.ranked[0].notes)
    experts = ask("mixtral-8x7b", "rtx4090x2", {})
    model = experts.model
    # Mixtral's own figures: 46.7B in all, 12.9B for each token
    assert model.parameters / 1e9 == pytest.approx(46.7, abs=0.1)
    assert model.active / 1e9 == pytest.approx(12.9, abs=0.1)
    dense = ask("llama-3.1-70b", "rtx4090x2", {})
    assert next(c for c in experts.ranked if c.option.method == "q4_k_m").speed.decode > 2 * max(
        c.speed.decode for c in dense.ranked if c.option.method == "q4_k_m"
    )


def test_the_commands_that_follow(ask: Any) -> None:
    answer = ask("llama-2-7b", "h100x2", {})
    quantize, serve, deploy = next_commands(answer, answer.ranked[0])
    assert quantize.endswith("--method awq -o llama-2-7b-awq")
    assert serve == "lowbit serve llama-2-7b-awq --runtime vllm --context 4096 --parallel 1 --tensor-parallel 2"
    assert deploy.startswith("lowbit deploy serve llama-2-7b-awq")
    gguf = ask("llama-2-7b", "cpu:8c,16g", {})
    assert next_commands(gguf, gguf.ranked[0])[0].endswith("--method q4_k_m -o llama-2-7b-q4_k_m.gguf")
    odd = ask("qwen2.5-0.5b", "rtx4090", {})
    fitting = {candidate.option.method: candidate for candidate in odd.ranked}
    # 896 inputs are 7 x 128, 4864 are 38 x 128: nothing to add
    assert next_commands(odd, fitting["awq"])[0].endswith("--method awq -o qwen2.5-0.5b-awq")


def test_devices_that_cannot_share_a_model_stay_out(ask: Any) -> None:
    best = ask("llama-2-13b", "h100x3", {}).ranked[0]
    assert best.devices == 2
    assert "40 heads (40 of keys) cannot be split over 3 devices: 2 of 3 would be used" in [t.en for t in best.notes]
    # llama.cpp divides by layers
    layers = ask("llama-2-13b", "h100x3", {"scenario": "cpu"}).ranked[0]
    assert (layers.runtime, layers.devices) == ("llama.cpp", 3)


def test_a_context_that_is_not_asked_for_is_the_models(ask: Any) -> None:
    assert ask("llama-2-7b", "h100", {"context": 0}).wishes.load.context == 4096


def test_every_scenario_answers(ask: Any) -> None:
    for scenario in scenarios():
        answer = ask("llama-3.1-8b", "rtx4090", {"scenario": scenario})
        assert answer.possible
        assert answer.scenario == scenario
