"""Servers as they are: one that echoes log-probabilities as vLLM does, one that tells of next tokens as llama-server does,
one that gives none, and none at all. They compute with the tiny model, so that scores must equal transformers' own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import EvaluationError
from lowbit.core.progress import Silent
from lowbit.core.streamed_model import StreamedModel
from lowbit.evals.served import divergence_over, measure_served
from lowbit.evals.tasks.catalogue import build, find_leaves, parse_tasks
from lowbit.evals.tasks.endpoint import Endpoint, endpoint_engine
from lowbit.evals.tasks.engines import transformers_engine
from lowbit.evals.tasks.harness import run_leaf
from lowbit.evals.tasks.local_data import LocalData

pytest.importorskip("lm_eval")
Answer = Callable[[str, dict[str, Any]], Any]


@contextmanager
def server(answer: Answer, owner: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "tiny", "owned_by": owner}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(answer(self.path, body))

        def _send(self, content: Any) -> None:
            status, content = content if isinstance(content, tuple) else (200, content)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture(scope="module")
def logs(tiny_llama: Path) -> Callable[[list[int]], torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    lock = threading.Lock()

    def log_probs(ids: list[int]) -> torch.Tensor:
        with lock, torch.no_grad():
            found: torch.Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            return found

    return log_probs


@pytest.fixture(scope="module")
def like_vllm(logs: Callable[[list[int]], torch.Tensor]) -> Answer:
    def answer(path: str, body: dict[str, Any]) -> Any:
        assert path == "/v1/completions"
        ids = body["prompt"]
        if not isinstance(ids, list):
            return {"choices": [{"text": " an answer. Question: more"}]}
        table = logs(ids)
        if "prompt_logprobs" in body:
            tops = [line.topk(body["prompt_logprobs"]) for line in table[:-1]]
            told = [{str(int(i)): {"logprob": float(v)} for v, i in zip(*top, strict=True)} for top in tops]
            return {"choices": [{"prompt_logprobs": [None, *told]}]}
        values = [None] + [float(table[i, token]) for i, token in enumerate(ids[1:])] + [float(table[-1].max())]
        tops = [None] + [{"x": float(line.max())} for line in table]
        return {"choices": [{"logprobs": {"token_logprobs": values, "top_logprobs": tops}}]}

    return answer


@pytest.fixture(scope="module")
def like_llama_server(logs: Callable[[list[int]], torch.Tensor]) -> Answer:
    def answer(path: str, body: dict[str, Any]) -> Any:
        assert path == "/completion"
        table = logs(body["prompt"])[-1]
        top = table.topk(min(body["n_probs"] if body["n_probs"] > 1000 else 3, len(table)))
        entries = [{"id": int(i), "logprob": float(v)} for v, i in zip(*top, strict=True)]
        return {"completion_probabilities": [{"top_logprobs": entries}]}

    return answer


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
def test_scores_equal_those_in_process(
    kind: str, like_vllm: Answer, like_llama_server: Answer, tiny_llama: Path, task_data: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    # llama-server is asked token by token: a long text is left to the other
    leaves = find_leaves(
        parse_tasks("hellaswag:6,mmlu_anatomy:3,wikitext" if kind == "vllm" else "hellaswag:2,mmlu_anatomy:2", None)
    )
    data = LocalData(task_data)
    checkpoint = open_checkpoint(tiny_llama)
    with transformers_engine(checkpoint, tokenizer, torch.device("cpu"), torch.float32, batch_size=1) as engine:
        expected = [run_leaf(build(leaf, data), leaf, engine) for leaf in leaves]
    with server(like_vllm if kind == "vllm" else like_llama_server, kind) as url:
        endpoint = Endpoint(f"{url}/v1")
        assert endpoint.is_llama_cpp == (kind == "llamacpp")
        endpoint.check_scores([5, 6, 7])
        engine = endpoint_engine(endpoint, tokenizer, context=256)
        found = [run_leaf(build(leaf, data), leaf, engine) for leaf in leaves]
    for mine, right in zip(found, expected, strict=True):
        assert mine.answers == right.answers
        assert mine.items == pytest.approx(right.items, rel=1e-4)


def test_generation_stops_where_it_is_told(like_vllm: Answer) -> None:
    with server(like_vllm, "vllm") as url:
        assert Endpoint(url).generate("Question", max_tokens=9, stop=["Question:"]) == " an answer. "


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
def test_served_divergence(
    kind: str, like_vllm: Answer, like_llama_server: Answer, tiny_llama: Path, make_model: Callable[..., Path]
) -> None:
    def streamed(folder: Path) -> StreamedModel:
        return StreamedModel(open_checkpoint(folder), torch.device("cpu"), torch.float32)

    windows = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(0))
    with server(like_vllm if kind == "vllm" else like_llama_server, kind) as url:
        listed = 511 if kind == "vllm" else 2000
        found = measure_served(
            Endpoint(url), streamed(make_model(seed=3)), streamed(tiny_llama), windows, Silent(), listed=listed
        )
    assert found.dense_kl is not None
    assert found.kl == pytest.approx(found.dense_kl, rel=0.02)
    assert found.kl > 0.1


def test_divergence_over_a_list_is_a_lower_bound() -> None:
    base, other = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    full = (base.exp() * (base - other)).sum().item()
    lists = [
        dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) for top in (other.topk(9), other.topk(60))
    ]
    some, most = (divergence_over(base, top) for top in lists)
    assert 0 < some < most < full


def test_no_log_probabilities_is_an_error() -> None:
    def silent(path: str, body: dict[str, Any]) -> Any:
        return {"choices": [{"text": " Paris", "logprobs": None}]}

    with server(silent, "someone") as url, pytest.raises(EvaluationError, match="gives no log-probabilities"):
        Endpoint(url).check_scores([1, 2, 3])


def test_ignored_echo_is_an_error() -> None:
    def unechoed(path: str, body: dict[str, Any]) -> Any:
        return {"choices": [{"logprobs": {"token_logprobs": [-0.5], "top_logprobs": [{"x": -0.5}]}}]}

    with server(unechoed, "someone") as url, pytest.raises(EvaluationError, match="gives no log-probabilities"):
        Endpoint(url).check_scores([1, 2, 3])


def test_refusals_and_silence_are_errors() -> None:
    refused = pytest.raises(EvaluationError, match="404.*no such model")
    with server(lambda *_: (404, {"error": "no such model"}), "vllm") as url, refused:
        Endpoint(url).score([1, 2], [3])
    with pytest.raises(EvaluationError, match="does not answer"):
        Endpoint(url)
