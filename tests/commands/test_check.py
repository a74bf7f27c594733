"""lowbit check passes what is right, and fails what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.api.check import _compare
from lowbit.core.checkpoint.gguf import GgufCheckpoint
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.tokenizer import load_tokenizer
from lowbit.runtimes.artifact import read_artifact
from lowbit.runtimes.client import Client
from lowbit.runtimes.smoke import PROMPTS, Answers, ask
from tests.commands.serving import run
from tests.runtimes.stub_server import stub


@pytest.fixture(scope="module")
def report(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("xllamacpp")
    done = run(tmp_path_factory.mktemp("check"), "check", smollm2_gguf, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_good_file_passes(report: dict[str, Any]) -> None:
    names = {finding["name"] for finding in report["findings"]}
    assert {"starts", "next tokens", "no garbage", "long prompt", "chat template", "repeats itself", "streaming",
            "stop word", "two at once", "chat", "too long a prompt"} <= names  # fmt: skip
    assert report["passed"]
    assert report["runtime"] == "llama.cpp"
    assert report["agreement"] > 0.9
    assert "Paris" in report["answer"]


def test_wrong_answers_fail(smollm2_gguf: Path) -> None:
    checkpoint = GgufCheckpoint(smollm2_gguf, dtype=torch.float32)
    model = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    wrong = Answers(tuple(" banana" for _ in PROMPTS), " xq vv!! zz kj 77 ~~ pq ww", "\n\n%%", " qq", ())
    share, findings = _compare(model, load_tokenizer(checkpoint), read_artifact(smollm2_gguf), wrong, PROMPTS[0], True)
    assert share == 0
    assert {finding.name: finding.ok for finding in findings} == {
        "next tokens": False,
        "no garbage": False,
        "long prompt": False,
        "chat template": False,
    }


def test_a_server_that_answers_what_was_not_asked_is_found_out() -> None:
    with stub() as (url, _):
        answers = ask(Client(url, "stub"), long_prompt="long", too_long="too long", chat=True, specials=(" three",))
    found = {finding.name: finding.ok for finding in answers.findings}
    assert found["streaming"]
    assert found["repeats itself"]
    assert not found["stop word"]  # the stub goes on after it
    assert not found["too long a prompt"]  # and drops what is too long
    assert not found["chat"]  # and shows special tokens
    assert answers.next == ("one",) * len(PROMPTS)
