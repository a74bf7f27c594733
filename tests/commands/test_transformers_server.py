"""Our launcher around `transformers serve`: bitsandbytes by variables, a key, one model and nothing else."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.runtimes.description import BitsAndBytes
from lowbit.runtimes.transformers_server import Gate, quantization_config
from tests.commands.serving import Serving

openai = pytest.importorskip("openai")
NF4 = {"LOAD_IN_4BIT": "true", "BNB_4BIT_COMPUTE_DTYPE": "float16", "BNB_4BIT_QUANT_TYPE": "nf4"}


def test_settings_reach_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    four = quantization_config(BitsAndBytes(4, "fp4", "float16", True))
    assert (four.load_in_4bit, four.load_in_8bit, four.bnb_4bit_quant_type) == (True, False, "fp4")
    assert four.bnb_4bit_compute_dtype == torch.float16
    assert four.bnb_4bit_use_double_quant
    assert quantization_config(BitsAndBytes(8)).load_in_8bit
    assert quantization_config(None) is None


def through_gate(path: str, key: str, header: str | None) -> int:
    """HTTP status; 200 when the request got through."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if header is None else [(b"authorization", header.encode())]
    asyncio.run(Gate(app, key)({"type": "http", "path": path, "headers": headers}, None, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("path", "key", "header", "status"),
    [
        ("/v1/completions", "secret", "Bearer secret", 200),
        ("/v1/completions", "secret", "Bearer Secret", 401),
        ("/v1/completions", "secret", None, 401),
        ("/v1/models", "secret", None, 401),
        ("/v1/completions", "", None, 200),
        ("/health", "secret", None, 200),
        ("/load_model", "secret", "Bearer secret", 404),
        ("/load_model", "", None, 404),
        ("/docs", "", None, 404),
    ],
)
def test_gate(path: str, key: str, header: str | None, status: int) -> None:
    assert through_gate(path, key, header) == status


def test_served_with_variables_of_bitsandbytes(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("bitsandbytes", "fastapi", "uvicorn"):
        pytest.importorskip(name)
    options = ("--threads", "1", "--name", "tiny")
    with Serving(tmp_path, tiny_llama, *options, LOWBIT_API_KEY="secret", **NF4) as server:
        assert server.ready["runtime"] == "transformers"
        client = openai.OpenAI(base_url=server.ready["url"], api_key="secret", max_retries=0)
        assert [model.id for model in client.models.list().data] == ["tiny"]
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True)]
        assert "".join(pieces) == whole.choices[0].message.content
        assert client.completions.create(model="tiny", prompt="Hello", max_tokens=3).usage.completion_tokens == 3
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.ready["url"], api_key="no", max_retries=0).models.list()
        with pytest.raises(openai.BadRequestError, match="pinned to 'tiny'"):
            client.completions.create(model="another/model", prompt="Hello", max_tokens=1)
        base = server.ready["url"].removesuffix("/v1")
        with urllib.request.urlopen(f"{base}/health") as answer:
            assert json.load(answer) == {"status": "ok"}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(urllib.request.Request(f"{base}/load_model", b"{}", method="POST"))
    assert "stopping" in server.stderr()
