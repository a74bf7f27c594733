"""The demo from its beginning to its end, on a model of a few kilobytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowbit.cli import app
from tests.gguf_files import write_gguf


def test_quantizes_compares_reports_and_asks(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    model = write_gguf(tiny_llama, tmp_path / "tiny.gguf")
    small = [
        "--num-samples",
        "4",
        "--seq-len",
        "64",
        "--windows",
        "2",
        "--model",
        str(model),
        "-o",
        str(tmp_path / "demo"),
    ]
    done = CliRunner().invoke(app, ["demo", "--methods", "fp16,rtn,q4_k_m", *small])
    assert done.exit_code == 0, done.output
    said = done.stdout
    assert "3 ways to keep tiny.gguf" in said
    assert "perplexity" in said
    assert (tmp_path / "demo/report.html").stat().st_size > 10**6
    assert "left" in done.stderr
    assert "q4_k_m (3 of 3): " in done.stderr
    for command in ("chat", "inspect", "recommend", "deploy serve"):
        assert f"  lowbit {command} " in said
    pytest.importorskip("xllamacpp")
    assert "served by llama.cpp" in said
    assert "not served" not in said


def test_a_failed_method_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    asked = ["demo", "--methods", "fp16,q4_k_x", "--model", str(tiny_llama), "-o", str(tmp_path / "demo")]
    assert CliRunner().invoke(app, asked).exit_code != 0
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "file")])
    assert done.exit_code != 0
