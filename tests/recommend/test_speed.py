"""The speed model: a roofline by hand, and what local measurements do to it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lowbit.api.recommend import recommend
from lowbit.recommend.candidates import Wishes
from lowbit.recommend.hardware import parse_hardware
from lowbit.recommend.memory import Load, runtime_constants
from lowbit.recommend.records import BenchRecord, append_record, default_file, read_records
from lowbit.recommend.shape import shape_of_config
from lowbit.recommend.speed import Speed, Work, general_speed, predicted_speed
from tests.recommend.models import CONFIGS, write_config

SHAPE = shape_of_config(CONFIGS["llama-2-7b"])
CPU = parse_hardware("cpu:8c,32g,50gbs")
RECORD = BenchRecord("m", 4 * 10**9, "q4_k_m", "llama.cpp", CPU.id, 8.0, 40.0, 4096, 1, "2026-11-22T12:00:00Z", "0.1.0")


def test_decoding_reads_every_byte_once() -> None:
    constants = runtime_constants("llama.cpp", "cpu")
    share, apart = constants["decode_efficiency"], constants["step_ms"] / 1000
    speed = general_speed(Work(4e9, 6.7e9), SHAPE, Load(4096), "llama.cpp", replace(CPU, flops=1e15))
    # 4 GB of weights, half of the 2 GiB cache, 50 GB/s
    assert 1 / speed.decode == pytest.approx((4e9 + 2**30) / (50e9 * share) + apart)
    assert speed.basis == "rule"
    # with many requests at once a processor computes longer than it reads
    slow = general_speed(Work(4e9, 6.7e9), SHAPE, Load(64, 1000), "llama.cpp", replace(CPU, flops=1e12))
    assert 1 / slow.decode == pytest.approx(2 * 6.7e12 / (1e12 * constants["prefill_efficiency"]) + apart)


def test_prefill_multiplies_every_weight() -> None:
    share = runtime_constants("vllm", "gpu")["prefill_efficiency"]
    gpu = parse_hardware("h100")
    speed = general_speed(Work(4e9, 7e9), SHAPE, Load(), "vllm", gpu)
    assert speed.prefill == pytest.approx(989e12 * share / 14e9)
    two = general_speed(Work(4e9, 7e9), SHAPE, Load(), "vllm", replace(gpu, devices=2))
    assert speed.prefill < two.prefill < 2 * speed.prefill


def test_measurements_correct_and_tell_their_error() -> None:
    general = Speed(10, 100, "rule")
    arguments = ("other", "q4_k_m", Load(), "llama.cpp", CPU)
    assert predicted_speed(general, [], *arguments) == general
    # all measured at 0.8 and 0.4 of the rule: the same is expected of the next
    pairs = [(replace(RECORD, model_id=f"m{n}"), Speed(10, 100, "rule")) for n in range(3)]
    better = predicted_speed(general, pairs, *arguments)
    assert (better.decode, better.prefill) == (pytest.approx(8), pytest.approx(40))
    assert (better.basis, better.samples, better.error) == ("predicted", 3, pytest.approx(0))
    # two that contradict each other: the mean, and an error that says so
    apart = [(RECORD, Speed(8, 40, "rule")), (replace(RECORD, decode_tokens_per_s=16.0), Speed(8, 40, "rule"))]
    spread = predicted_speed(general, apart, *arguments)
    assert spread.decode == pytest.approx(10 * 2**0.5)
    assert spread.error == pytest.approx((1 + 0.5) / 2)
    # of another runtime or machine nothing is learnt
    elsewhere = [
        (replace(RECORD, hardware="h100"), Speed(1, 1, "rule")),
        (replace(RECORD, runtime="vllm"), Speed(1, 1, "rule")),
    ]
    assert predicted_speed(general, elsewhere, *arguments) == general


def test_the_same_model_and_load_is_measured_not_predicted() -> None:
    pairs = [
        (RECORD, Speed(10, 100, "rule")),
        (replace(RECORD, decode_tokens_per_s=9.0, date="2026-11-23"), Speed(10, 100, "rule")),
    ]
    same = predicted_speed(Speed(10, 100, "rule"), pairs, "m", "q4_k_m", Load(4096), "llama.cpp", CPU)
    assert (same.basis, same.decode) == ("measured", 9.0)
    other = predicted_speed(Speed(10, 100, "rule"), pairs, "m", "q4_k_m", Load(4096, 8), "llama.cpp", CPU)
    assert other.basis == "predicted"


def test_records_survive_other_versions_and_broken_lines(tmp_path: Path) -> None:
    file = tmp_path / "data" / "bench.jsonl"
    assert read_records(file) == []
    append_record(RECORD, file)
    with file.open("a") as stream:
        stream.write('{"model_id": "of another version"}\n{broken\n')
        stream.write(json.dumps({**asdict(RECORD), "new_field": 1}) + "\n")
    append_record(replace(RECORD, model_id="n"), file)
    assert [record.model_id for record in read_records(file)] == ["m", "m", "n"]


def test_where_records_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_file() == tmp_path / "lowbit" / "bench.jsonl"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_file() == Path.home() / ".local" / "share" / "lowbit" / "bench.jsonl"


def test_a_recommendation_uses_what_was_measured(tmp_path: Path) -> None:
    model = write_config(tmp_path, "llama-2-7b")
    records = tmp_path / "bench.jsonl"

    def asked(**wishes: Any) -> Speed:
        answer = recommend(model, hardware=CPU.id, wishes=Wishes(**wishes), records=records)
        return next(c.speed for c in answer.ranked if c.option.method == "q4_k_m")

    general = asked()
    size = 4_080_000_000
    append_record(
        replace(RECORD, model_id="elsewhere", artifact_bytes=size, decode_tokens_per_s=general.decode), records
    )
    assert asked().basis == "predicted"
    append_record(replace(RECORD, model_id=str(model), decode_tokens_per_s=5.5), records)
    assert (asked().basis, asked().decode) == ("measured", 5.5)
