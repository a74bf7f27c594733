"""lowbit inspect and evaluate on a GGUF file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.core.errors import CheckpointError
from tests.gguf_files import write_gguf


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1)


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inspect")
    source = write_gguf(folder, place / "base.gguf")
    result = CliRunner().invoke(
        app, ["quantize", str(source), "--method", "q4_k_m", "-o", str(place / "m.gguf"), "--no-verify", "-q"]
    )
    assert result.exit_code == 0, result.output
    return place / "m.gguf"


def test_inspect_as_json(artifact: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(artifact), "--json", "--check"])
    found = json.loads(result.stdout)
    assert found["tensors"]["blk.0.attn_q.weight"] == {"type": "Q4_K", "shape": [256, 256], "bytes": 256 * 144}
    assert found["types"]["Q4_K"]["bytes"] * 8 == found["types"]["Q4_K"]["weights"] * 4.5
    assert found["changed_files"] == []
    assert found["metadata"]["llama.block_count"] == 1


def test_inspect_for_people(artifact: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(artifact), "--layers"])
    assert result.exit_code == 0
    for part in ("Q4_K", "blk.0.attn_q.weight", "general.quantized_by", "{% for m in messages %}"):
        assert part in result.stdout


def test_a_changed_byte_is_noticed(artifact: Path, tmp_path: Path) -> None:
    content = bytearray(artifact.read_bytes())
    content[-40] ^= 1
    (tmp_path / "m.gguf").write_bytes(content)
    (tmp_path / "m.lowbit.json").write_text(artifact.with_name("m.lowbit.json").read_text())
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "m.gguf"), "--check"])
    assert isinstance(result.exception, CheckpointError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.gguf", "none.gguf does not exist"),
        ("none-00001-of-00002.gguf", "none-00001-of-00002.gguf is missing"),
        ("none", "none does not exist"),
    ],
)
def test_what_is_not_there_is_said_so(name: str, said: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["inspect", str(tmp_path / name)])
    assert isinstance(found.exception, CheckpointError)
    assert said in str(found.exception)


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
def test_dequantized_weights_and_llama_cpp_agree(folder: Path, artifact: Path) -> None:
    from lowbit.api.evaluate import evaluate
    from lowbit.api.gguf_evaluate import evaluate_llama_cpp

    asked = {"base": folder, "dataset": "pydoc", "windows": 1, "context": 32}
    dense = evaluate(artifact, **asked)
    real, on_same = evaluate_llama_cpp(artifact, **asked)
    assert real.tokens == 32
    assert dense.kl is not None
    assert on_same == pytest.approx(dense.kl, rel=0.5)
    assert 0 < real.kl < 3 * dense.kl + 0.02
    assert real.kl > dense.kl / 3
