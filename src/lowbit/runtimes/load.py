"""Load on a server, measured at the client: every token of every stream with the time it came.

Definitions as in vLLM's `bench serve` (benchmarks/serve.py): time to first token, time between tokens, time per output
token after the first, from the moment a request is sent.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowbit.core.errors import LowbitError, ServeError
from lowbit.runtimes.client import Client

PERCENTILES = (50, 95, 99)
# plain words, about one token each in most vocabularies; drawn at random, so that no prompt begins like another
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason"
)


@dataclass(frozen=True)
class Workload:
    """input_len, output_len: tokens of prompt and answer, nearly. requests: how many in all. seed: of the prompts."""

    input_len: int = 128
    output_len: int = 64
    requests: int = 16
    seed: int = 0


@dataclass
class Timing:
    """One request. Seconds from its start; `pieces`: when each piece of the stream came. error: None when it was answered."""

    pieces: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first."""
        if len(self.pieces) < 2 or self.output_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.output_tokens - 1)


@dataclass(frozen=True)
class LoadResult:
    """At one concurrency. Seconds; each spread has "mean" and "p50", "p95", "p99"."""

    concurrency: int
    requests: int
    failed: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft: dict[str, float]
    itl: dict[str, float]
    tpot: dict[str, float]
    latency: dict[str, float]
    errors: tuple[str, ...] = ()


def prompts(workload: Workload, tokens_per_word: float, count: int) -> list[str]:
    """`count` prompts of about `workload.input_len` tokens, the same for the same seed."""
    drawn, words = random.Random(workload.seed), _TEXT.split()
    length = max(1, round(workload.input_len / tokens_per_word))
    return [" ".join(drawn.choices(words, k=length)) for _ in range(count)]


def tokens_per_word(client: Client) -> float:
    """How many tokens the served model makes of a word of ours. Raises ServeError when the server counts no tokens."""
    usage = client.complete(_TEXT, max_tokens=1, temperature=0).get("usage") or {}
    if not usage.get("prompt_tokens"):
        raise ServeError(f"{client.url} does not say how many tokens a prompt has, so its length cannot be set")
    return float(usage["prompt_tokens"]) / len(_TEXT.split())


def measure(
    client: Client, workload: Workload, concurrency: int, options: dict[str, Any], advance: Callable[[], None]
) -> LoadResult:
    """Keep `concurrency` requests running until all are answered. options: of the request, such as ignore_eos.

    A warm-up request of each client comes first and is not counted. Raises ServeError when no request was answered.
    """
    texts = prompts(workload, tokens_per_word(client), workload.requests + concurrency)
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(lambda text: request(client, text, 4, options), texts[workload.requests :]))
        started = time.perf_counter()

        def one(text: str) -> Timing:
            timing = request(client, text, workload.output_len, options)
            advance()
            return timing

        timings = list(pool.map(one, texts[: workload.requests]))
        seconds = time.perf_counter() - started
    return summarize(timings, concurrency, seconds)


def request(client: Client, text: str, tokens: int, options: dict[str, Any]) -> Timing:
    """One streamed completion of `tokens` tokens."""
    timing = Timing()
    body = {"prompt": text, "max_tokens": tokens, "temperature": 0, **options}
    started = time.perf_counter()
    try:
        for chunk in client.stream("/completions", body):
            now = time.perf_counter() - started
            if any(choice.get("text") for choice in chunk.get("choices") or []):
                timing.pieces.append(now)
            usage = chunk.get("usage")
            if usage:
                timing.prompt_tokens = int(usage["prompt_tokens"])
                timing.output_tokens = int(usage["completion_tokens"])
    except LowbitError as error:
        timing.error = error.message
    if timing.error is None and not timing.pieces:
        timing.error = "the stream ended without a token"
    # servers that count nothing send a token a piece
    timing.output_tokens = timing.output_tokens or len(timing.pieces)
    return timing


def summarize(timings: Sequence[Timing], concurrency: int, seconds: float) -> LoadResult:
    """Raises ServeError when no request was answered."""
    done = [timing for timing in timings if timing.error is None]
    errors = tuple(dict.fromkeys(timing.error for timing in timings if timing.error is not None))
    if not done:
        raise ServeError(f"not one of {len(timings)} requests was answered: {errors[0] if errors else 'none was sent'}")
    output = sum(timing.output_tokens for timing in done)
    between = [b - a for timing in done for a, b in zip(timing.pieces, timing.pieces[1:], strict=False)]
    return LoadResult(
        concurrency=concurrency,
        requests=len(done),
        failed=len(timings) - len(done),
        seconds=seconds,
        prompt_tokens=sum(timing.prompt_tokens for timing in done),
        output_tokens=output,
        requests_per_s=len(done) / seconds,
        output_tokens_per_s=output / seconds,
        ttft=spread([timing.pieces[0] for timing in done]),
        itl=spread(between),
        tpot=spread([timing.per_token for timing in done if timing.per_token is not None]),
        latency=spread([timing.pieces[-1] for timing in done]),
        errors=errors,
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; {} for no values."""
    if not values:
        return {}
    marks = np.percentile(np.asarray(values), PERCENTILES).tolist()
    return {"mean": float(np.mean(values)), **{f"p{p}": mark for p, mark in zip(PERCENTILES, marks, strict=True)}}


class PeakSampler:
    """Highest value of `read` while the context is open, asked every `every` seconds."""

    def __init__(self, read: Callable[[], int], every: float = 0.2) -> None:
        self.read, self.every, self.peak = read, every, 0
        self._stop = threading.Event()

    def __enter__(self) -> PeakSampler:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        for value in self._values():
            self.peak = max(self.peak, value)

    def _values(self) -> Iterator[int]:
        yield self.read()
        while not self._stop.wait(self.every):
            yield self.read()
