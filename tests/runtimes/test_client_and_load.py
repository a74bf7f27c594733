"""The client of OpenAI-compatible servers, and what it measures under load."""

from __future__ import annotations

import statistics
import threading
from pathlib import Path

import pytest

from lowbit.core.errors import ServeError
from lowbit.runtimes.client import Client, RefusedError, UnreachableError
from lowbit.runtimes.energy import EnergyMeter
from lowbit.runtimes.load import PeakSampler, Timing, Workload, measure, prompts, request, spread, summarize
from tests.runtimes.stub_server import WORDS, stub


def test_answers_streams_and_models() -> None:
    with stub(key="secret") as (url, asked):
        client = Client(url, "stub", "secret")
        assert client.models() == ["stub"]
        assert client.complete("hello", max_tokens=2)["choices"][0]["text"] == "one two"
        pieces = [choice["text"] for chunk in client.stream("/completions", {"prompt": "hello", "max_tokens": 3})
                  for choice in chunk["choices"]]  # fmt: skip
        assert pieces == WORDS[:3]
        assert {entry["key"] for entry in asked} == {"Bearer secret"}
        assert asked[0]["model"] == "stub"


def test_errors_say_who_said_what() -> None:
    with stub(key="secret") as (url, _):
        with pytest.raises(RefusedError, match="refused the API key") as refused:
            Client(url, "stub", "wrong").complete("hello", max_tokens=1)
        assert refused.value.status == 401
        with pytest.raises(RefusedError, match="answered 400: the prompt is too long"):
            Client(url, "stub", "secret").complete("refuse", max_tokens=1)
        with pytest.raises(RefusedError, match="the engine died"):
            list(Client(url, "stub", "secret").stream("/completions", {"prompt": "break", "max_tokens": 3}))
    with pytest.raises(UnreachableError, match="nobody answers"):
        Client(url, "stub").models()


def test_load_counts_what_the_server_counts() -> None:
    advanced: list[int] = []
    with stub() as (url, asked):
        result = measure(Client(url, "stub"), Workload(12, 4, 6), 3, {"ignore_eos": True}, lambda: advanced.append(1))
    assert (result.requests, result.failed, result.concurrency) == (6, 0, 3)
    assert result.output_tokens == 6 * 4
    # two tokens a word: prompts of 12 tokens have 6 words
    assert result.prompt_tokens == 6 * 12
    assert len(advanced) == 6
    streams = [entry for entry in asked if entry.get("stream")]
    assert len(streams) == 6 + 3  # and one warm-up a client
    assert all(entry["ignore_eos"] and entry["temperature"] == 0 for entry in streams)
    assert len({entry["prompt"] for entry in streams}) == 9


def test_failed_requests_are_counted_apart() -> None:
    with stub() as (url, _):
        timing = request(Client(url, "stub"), "break", 3, {})
        assert "the engine died" in (timing.error or "")
        good = request(Client(url, "stub"), "fine", 3, {})
    result = summarize([timing, good], 1, 2.0)
    assert (result.requests, result.failed, result.output_tokens) == (1, 1, 3)
    assert "the engine died" in result.errors[0]
    with pytest.raises(ServeError, match="not one of 1"):
        summarize([timing], 1, 2.0)


def test_summary_by_hand() -> None:
    timings = [Timing([1.0, 1.5, 2.5], 10, 3), Timing([2.0, 2.25], 20, 3)]
    result = summarize(timings, 2, 4.0)
    assert result.ttft["mean"] == 1.5
    assert result.tpot["mean"] == pytest.approx(((2.5 - 1.0) / 2 + 0.25 / 2) / 2)
    assert result.itl["p50"] == statistics.median([0.5, 1.0, 0.25])
    assert result.latency["mean"] == pytest.approx((2.5 + 2.25) / 2)
    assert (result.output_tokens_per_s, result.requests_per_s) == (6 / 4, 2 / 4)


def test_percentiles_by_hand() -> None:
    values = list(range(101))
    assert spread(values) == {"mean": 50.0, "p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert spread([]) == {}


def test_prompts_repeat_by_seed() -> None:
    assert prompts(Workload(seed=1), 2.0, 3) == prompts(Workload(seed=1), 2.0, 3)
    assert prompts(Workload(seed=1), 2.0, 3) != prompts(Workload(seed=2), 2.0, 3)
    assert all(len(prompt.split()) == 64 for prompt in prompts(Workload(input_len=128), 2.0, 3))


def test_peak() -> None:
    values, done = [3, 9, 4], threading.Event()

    def read() -> int:
        if values:
            return values.pop(0)
        done.set()
        return 1

    with PeakSampler(read, every=0.001) as sampler:
        assert done.wait(10)
    assert sampler.peak == 9


def rapl(folder: Path, name: str, energy: int) -> Path:
    zone = folder / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text("1000000000\n")
    return zone


def test_energy_of_all_packages_and_over_the_counters_end(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", 5_000_000)
    rapl(tmp_path, "intel-rapl:1", 999_000_000)
    rapl(tmp_path, "intel-rapl:0:0", 1)  # cores, counted in their package already
    meter = EnergyMeter(tmp_path)
    rapl(tmp_path, "intel-rapl:0", 7_500_000)
    rapl(tmp_path, "intel-rapl:1", 1_000_000)
    rapl(tmp_path, "intel-rapl:0:0", 900_000_000)
    assert meter.source.startswith("CPU packages")
    joules = meter.joules()
    assert joules is not None
    if meter.source == "CPU packages":
        assert joules == pytest.approx(2.5 + 2.0)


def test_no_energy_is_no_number(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path)
    if not meter.source:
        assert meter.joules() is None
