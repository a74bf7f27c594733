"""Any server with OpenAI's completions interface and log-probabilities, or llama.cpp's own, as an lm-eval model.

vLLM, SGLang and TensorRT-LLM score a whole prompt in one request ("echo"). llama-server tells of the next token only, so
that a continuation costs a request a token; its prompt cache makes each one cheap.
"""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lowbit.core.errors import EvaluationError

_TRIES = 3
_KNOWN = 64  # next-token lists of llama-server kept for choices that share a context
_LISTED = 1000  # next tokens asked of llama-server; a token below them is looked up among all


class Endpoint:
    """A client. url: of the server, with or without /v1. Raises EvaluationError when it does not answer as it should."""

    def __init__(self, url: str, *, model: str | None = None, timeout: float = 600.0, concurrency: int = 8) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/v1")
        self.url = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self.timeout = timeout
        models = self._get("/v1/models").get("data") or []
        self.model = model or (str(models[0].get("id")) if models else "")
        self.is_llama_cpp = any(entry.get("owned_by") == "llamacpp" for entry in models)
        self.concurrency = 1 if self.is_llama_cpp else concurrency
        self._next: OrderedDict[tuple[tuple[int, ...], int], dict[int, float]] = OrderedDict()

    def check_scores(self, tokens: Sequence[int]) -> None:
        """Ask for one score. Raises EvaluationError when the server gives no log-probabilities."""
        self.score(tokens[:-1], tokens[-1:])

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of `continuation` tokens after `context`, and whether greedy decoding gives it."""
        if self.is_llama_cpp:
            return self._score_stepwise(context, continuation)
        question = {"prompt": [*context, *continuation], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        answer = self._post("/v1/completions", {"model": self.model, **question})
        try:
            told = answer["choices"][0]["logprobs"]
            values = told["token_logprobs"][len(context) : len(context) + len(continuation)]
            tops = told["top_logprobs"][len(context) : len(context) + len(continuation)]
            if len(values) != len(continuation):
                raise ValueError("the prompt's tokens are missing")
            greedy = all(value >= max(top.values()) for value, top in zip(values, tops, strict=True))
            return math.fsum(values), greedy
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"{self.url} gives no log-probabilities of a prompt's tokens, which multiple-choice tasks are scored by",
                hint="a server with `echo` and `logprobs` in /v1/completions (vLLM, SGLang, TensorRT-LLM), or llama-server",
            ) from error

    def scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """`score` of many pairs, several at a time where the server batches."""
        if self.concurrency == 1:
            return [self.score(*pair) for pair in pairs]
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda pair: self.score(*pair), pairs))

    def generate(self, prompt: str, *, max_tokens: int, stop: Sequence[str]) -> str:
        """Greedy continuation of a text, up to any of the `stop` texts."""
        question = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stop": list(stop)[:4]}
        answer = self._post("/v1/completions", {"model": self.model, **question})
        try:
            text = str(answer["choices"][0]["text"])
        except (KeyError, IndexError, TypeError) as error:
            raise EvaluationError(f"{self.url} answered a completion without text") from error
        cuts = [text.find(end) for end in stop if end and end in text]
        return text[: min(cuts)] if cuts else text

    def next_tokens(self, tokens: Sequence[int], count: int) -> dict[int, float]:
        """Log-probabilities of the `count` likeliest next tokens, the likeliest first; llama-server only."""
        # told of before anything is biased; a token that ends the text, or a part of a character, would be answered
        # without them, so that a letter is made to come next
        question = {
            "prompt": list(tokens), "n_predict": 1, "n_probs": count, "logit_bias": [["a", 1e6]],
            "temperature": 0, "cache_prompt": True,
        }  # fmt: skip
        answer = self._post("/completion", question)
        try:
            top = answer["completion_probabilities"][0]["top_logprobs"]
            return {int(entry["id"]): float(entry["logprob"]) for entry in top}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EvaluationError(f"{self.url} gives no log-probabilities of next tokens") from error

    def prompt_tops(self, tokens: Sequence[int], count: int) -> list[dict[int, float]]:
        """For every position of a text, log-probabilities of (about) the `count` likeliest tokens that follow it: vLLM's
        `prompt_logprobs` and one generated token's, or llama-server asked token by token."""
        if self.is_llama_cpp:
            return [self.next_tokens(tokens[: end + 1], count) for end in range(len(tokens))]
        question = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": count}
        answer = self._post("/v1/completions", {"model": self.model, **question})
        try:
            told = answer["choices"][0]["prompt_logprobs"][1:]
            return [{int(token): float(entry["logprob"]) for token, entry in place.items()} for place in told]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EvaluationError(
                f"{self.url} gives no `prompt_logprobs`, which a divergence is measured by",
                hint="vLLM gives them, as many as its --max-logprobs; leave kl out for other servers",
            ) from error

    def _score_stepwise(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        total, greedy, tokens = 0.0, True, list(context)
        for token in continuation:
            top = self._remembered(tuple(tokens), _LISTED)
            if token not in top:
                top = self._remembered(tuple(tokens), 1 << 20)
            if token not in top:
                raise EvaluationError(f"{self.url} knows no token {token}", hint="--tokenizer of the served model")
            total += top[token]
            greedy = greedy and token == next(iter(top))
            tokens.append(token)
        return total, greedy

    def _remembered(self, tokens: tuple[int, ...], count: int) -> dict[int, float]:
        key = (tokens, count)
        if key not in self._next:
            self._next[key] = self.next_tokens(tokens, count)
            if len(self._next) > _KNOWN:
                self._next.popitem(last=False)
        return self._next[key]

    def _get(self, path: str) -> dict[str, Any]:
        return self._ask(urllib.request.Request(self.url + path))

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        return self._ask(urllib.request.Request(self.url + path, json.dumps(content).encode(), headers))

    def _ask(self, request: urllib.request.Request) -> dict[str, Any]:
        cause = ""
        for attempt in range(_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    content = json.load(answer)
                    return content if isinstance(content, dict) else {}
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise EvaluationError(
                        f"{request.full_url} answered {error.code}: {_said(error)}",
                        hint="the model's name and --context; a server of OpenAI's completions interface is needed",
                    ) from error
                cause = f"{error.code}: {_said(error)}"
            except (urllib.error.URLError, TimeoutError, OSError, ValueError) as error:
                cause = str(getattr(error, "reason", error))
            if attempt + 1 < _TRIES:
                time.sleep(0.5 * 2**attempt)
        raise EvaluationError(
            f"{self.url} does not answer: {cause}", hint="start the server and run this again: finished tasks are kept"
        )


def _said(error: urllib.error.HTTPError) -> str:
    return error.read(300).decode("utf-8", "replace").strip().replace("\n", " ")


def endpoint_engine(endpoint: Endpoint, tokenizer: Any, *, context: int) -> Any:
    """The endpoint as an lm-eval model. tokenizer: of the served model. context: tokens that it takes at most."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class EndpointModel(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed
        """Tokenizes as lm-eval's HFLM does, so that the same tokens are scored."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            bos = tokenizer.bos_token_id
            return self.eot_token_id if bos is None else int(bos)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            own = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            ids: list[int] = tokenizer(string, **own).input_ids
            return ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return endpoint.scores([_cut(ids, continuation) for _, ids, continuation in requests])

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def _rolling(self, text: str) -> float:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=context - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            return math.fsum(score for score, _ in endpoint.scores([_cut(ids, rest) for ids, rest in pairs]))

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            found = []
            for request in requests:
                prompt, options = request.args
                stop = handle_stop_sequences(options.get("until"), eos=tokenizer.eos_token)
                found.append(endpoint.generate(prompt, max_tokens=int(options.get("max_gen_toks", 256)), stop=stop))
            return found

    def _cut(ids: Sequence[int], continuation: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Left of the context is dropped where both do not fit, as HFLM does."""
        room = max(1, context - 1 - len(continuation))
        return ids[-room:], continuation

    return EndpointModel()
