"""The embedded llama.cpp behind `lowbit serve`, asked by the official openai client; and all that may go wrong."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.commands.serving import Serving, run, until

pytest.importorskip("xllamacpp")
openai = pytest.importorskip("openai")

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
SMALL = ("--context", "512", "--parallel", "2", "--threads", "1")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(smollm2_gguf: Path, state: Path) -> Iterator[Serving]:
    with Serving(state, smollm2_gguf, *SMALL, "--name", "smol", LOWBIT_API_KEY="secret") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Serving) -> Any:
    return openai.OpenAI(base_url=server.ready["url"], api_key="secret", max_retries=0)


def test_completions_repeat_themselves_at_temperature_0(client: Any) -> None:
    def ask() -> Any:
        return client.completions.create(model="smol", prompt="The capital of France is", max_tokens=8, temperature=0)

    first, second = ask(), ask()
    assert first.choices[0].text == second.choices[0].text
    assert "Paris" in first.choices[0].text
    assert first.choices[0].finish_reason == "length"
    assert first.usage.completion_tokens == 8
    assert first.model == "smol"


def test_chat_and_its_stream_say_the_same(client: Any) -> None:
    asked = {"model": "smol", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = [chunk for chunk in client.chat.completions.create(**asked, stream=True) if chunk.choices]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert len(chunks) > 6
    assert chunks[-1].choices[0].finish_reason == "length"


def test_log_probabilities(client: Any) -> None:
    answer = client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=3, temperature=0, logprobs=True,
                                            top_logprobs=4)  # fmt: skip
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 3
    for token in tokens:
        best = max(token.top_logprobs, key=lambda top: top.logprob)
        assert best.token == token.token
        assert len(token.top_logprobs) == 4
        assert token.logprob <= 0


def test_stop_words(client: Any) -> None:
    answer = client.completions.create(model="smol", prompt="Count: one, two, three, four,", max_tokens=30,
                                       temperature=0, stop=[","])  # fmt: skip
    assert "," not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_errors_are_openais(client: Any, server: Serving) -> None:
    wrong = openai.OpenAI(base_url=server.ready["url"], api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.completions.create(model="smol", prompt="Hello", max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="smol", prompt="word " * 2000, max_tokens=1)
    with pytest.raises(openai.NotFoundError):
        client.post("/nothing", cast_to=object)


def test_two_at_once(client: Any) -> None:
    def ask(prompt: str) -> str:
        answer = client.completions.create(model="smol", prompt=prompt, max_tokens=6, temperature=0)
        return str(answer.choices[0].text)

    prompts = ["The capital of France is", "Once upon a time"]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, prompts))
    assert together == [ask(prompt) for prompt in prompts]


def test_a_client_that_leaves_does_no_harm(client: Any) -> None:
    stream = client.completions.create(model="smol", prompt="Once", max_tokens=400, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="smol", prompt="Once", max_tokens=2).choices[0].text


def test_key_and_name_are_on_no_command_line(server: Serving) -> None:
    assert server.ready["model"] == "smol"
    assert not any("secret" in word for process in server.children for word in process.cmdline())


def test_ps_shows_it(server: Serving, state: Path) -> None:
    rows = json.loads(run(state, "ps", "--json").stdout)
    assert [(row["name"], row["status"], row["runtime"]) for row in rows] == [("smol", "ready", "llama.cpp")]
    assert rows[0]["url"] == server.ready["url"]
    assert rows[0]["mib"] > 50


def test_sigterm_finishes_the_answer(smollm2_gguf: Path, tmp_path: Path) -> None:
    with Serving(tmp_path, smollm2_gguf, *SMALL) as running:
        asked = openai.OpenAI(base_url=running.ready["url"], api_key="none", max_retries=0)
        stream = iter(asked.completions.create(model="m", prompt="Once", max_tokens=40, temperature=0, stream=True,
                                               extra_body={"ignore_eos": True}))  # fmt: skip
        next(stream)
        running.process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert running.process.wait(60) == 0
        assert "stopping" in running.stderr()


def test_kill_of_the_runtime_is_reported(smollm2_gguf: Path, tmp_path: Path) -> None:
    running = Serving(tmp_path, smollm2_gguf, *SMALL)
    os.kill(running.children[-1].pid, signal.SIGKILL)
    assert running.process.wait(20) == 1
    assert "error: llama.cpp ended while it was serving (signal 9): it was killed" in running.stderr()
    assert run(tmp_path, "ps").stdout.startswith("no server runs")


def test_kill_of_lowbit_leaves_no_child(smollm2_gguf: Path, tmp_path: Path) -> None:
    running = Serving(tmp_path, smollm2_gguf, *SMALL)
    children = running.children
    assert len(children) == 2
    running.process.kill()
    running.process.wait()
    assert until(lambda: not any(child.is_running() for child in children))


def test_in_the_background(smollm2_gguf: Path, tmp_path: Path) -> None:
    started = run(tmp_path, "serve", smollm2_gguf, *SMALL, "--port", "0", "--detach", "--name", "bg", "--json",
                  "--api-key", "secret")  # fmt: skip
    assert started.returncode == 0, started.stderr
    told = json.loads(started.stdout)
    asked = openai.OpenAI(base_url=told["url"], api_key="secret", max_retries=0)
    assert asked.completions.create(model="bg", prompt="Hello", max_tokens=1).choices[0].text
    logged = run(tmp_path, "logs", "bg").stdout
    assert "llama.cpp |" in logged
    assert "ready in" in logged
    assert "secret" not in logged
    assert run(tmp_path, "stop", "bg").stdout == "bg: stopped\n"
    with pytest.raises(openai.APIConnectionError):
        asked.completions.create(model="bg", prompt="Hello", max_tokens=1)
    assert run(tmp_path, "stop", "bg").returncode == 1


def test_an_error_is_one_line_and_a_hint(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "/nowhere.gguf")
    assert done.returncode == 1
    error, hint = done.stderr.strip().splitlines()
    assert error == "error: /nowhere.gguf does not exist"
    assert hint.startswith("hint: give a .gguf file")


def test_variables_of_bitsandbytes_are_strict(tiny_llama: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "serve", tiny_llama, LOAD_IN_8BIT="true", LOAD_IN_4BIT="true")
    assert done.returncode == 2
    assert "both true" in done.stderr
    planned = run(tmp_path, "serve", tiny_llama, "--dry-run", "--json", LOAD_IN_4BIT="true")
    assert json.loads(planned.stdout)["runtime"] == "transformers"
