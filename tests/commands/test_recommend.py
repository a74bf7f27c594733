"""lowbit recommend as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gguf_files import write_gguf
from tests.in_process import Run
from tests.recommend.models import write_config


def test_a_table_reasons_and_commands(lowbit_here: Run, tmp_path: Path) -> None:
    done = lowbit_here("recommend", write_config(tmp_path, "llama-2-7b"), "--hardware", "t4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "6.74B parameters" in lines[0]
    assert "Tesla T4 (15 GiB, 320 GB/s, compute capability 7.5); scenario low-end-gpu" in lines[1]
    assert any("lowbit quantize" in line and "--method awq" in line for line in lines)
    assert any(line.startswith("|█") and "GiB" in line for line in lines)
    assert "bf16 (vllm): Tesla T4 (7.5) has no bfloat16" in done.stdout
    assert "general rule" in done.stdout


def test_json_and_chinese(lowbit_here: Run, tmp_path: Path) -> None:
    model = write_config(tmp_path, "llama-3.2-1b")
    done = lowbit_here("recommend", model, "--hardware", "cpu:8c,16g", "--json", "--lang", "zh", "--concurrency", "2")
    answer = json.loads(done.stdout)
    first = answer["recommended"][0]
    assert (first["method"], first["runtime"], answer["possible"]) == ("q4_k_m", "llama.cpp", True)
    assert "专为处理器优化" in first["reasons"][0]["text"]
    memory = first["memory"]
    parts = memory["weights"] + memory["cache"] + memory["activations"] + memory["overhead"]
    assert memory["needed"] == parts == memory["total"] - memory["repacked"]
    assert answer["asked"]["load"]["concurrency"] == 2
    assert first["next"][0].startswith("lowbit quantize")


def test_nothing_that_keeps_the_limits_is_exit_code_3(lowbit_here: Run, tmp_path: Path) -> None:
    done = lowbit_here(
        "recommend", write_config(tmp_path, "llama-2-7b"), "--hardware", "board:4g", "--max-memory", "1GiB"
    )
    assert done.returncode == 3
    assert "nothing keeps all limits; the nearest" in done.stdout
    assert "q2_k" in done.stdout
    assert "Traceback" not in done.stderr


def test_an_artifact_that_is_quantized_already(lowbit_here: Run, tiny_llama: Path, tmp_path: Path) -> None:
    from lowbit.api.quantize import quantize
    from lowbit.api.run import Settings

    base = write_gguf(tiny_llama, tmp_path / "base.gguf")
    file = quantize(base, output=tmp_path / "small.gguf", method="q8_0", settings=Settings(verify=False)).path
    answer = json.loads(lowbit_here("recommend", file, "--hardware", "cpu:2c,4g", "--json").stdout)
    (only,) = answer["recommended"]
    assert only["method"] == "q8_0"
    assert not any("lowbit quantize" in command for command in only["next"])
    folder = quantize(tiny_llama, output=tmp_path / "w8", method="w8a8", settings=Settings(verify=False)).path
    answer = json.loads(lowbit_here("recommend", folder, "--hardware", "a100", "--json").stdout)
    assert [only["method"] for only in answer["recommended"]] == ["w8a8"]
    refused = json.loads(lowbit_here("recommend", folder, "--hardware", "v100", "--json").stdout)
    assert refused["recommended"] == []
    assert "Turing" in refused["ruled_out"][0]["reason"]
    assert not refused["possible"]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["--hardware", "rtx4099"], "did you mean", "cpu:8c,32g"),
        (["--scenario", "cpuu"], "did you mean 'cpu'", "edge"),
        (["--lang", "fr"], "language 'fr'", "--lang en or zh"),
        (["--cache-dtype", "fp88"], "did you mean 'fp8'", "q8_0"),
        (["--max-memory", "lots"], "amount of memory", "2GiB"),
    ],
)
def test_errors_are_one_line_and_a_hint(
    lowbit_here: Run, arguments: list[str], error: str, hint: str, tmp_path: Path
) -> None:
    hardware = [] if "--hardware" in arguments else ["--hardware", "t4"]
    done = lowbit_here("recommend", write_config(tmp_path, "llama-3.2-1b"), *hardware, *arguments)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-2].startswith("error: ")
    assert error in lines[-2]
    assert hint in lines[-1]


def test_a_model_that_is_not_there(lowbit_here: Run, tmp_path: Path) -> None:
    done = lowbit_here("recommend", tmp_path / "nowhere", "--hardware", "t4")
    assert done.returncode == 1
    assert "does not exist" in done.stderr
