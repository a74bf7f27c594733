"""The Job's command: the pod's index picks the recipe, what is done is not done again, SIGTERM ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowbit.deploy.job_entry import is_done
from lowbit.recipe import preset


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    for index, bits in enumerate((8, 4)):
        (folder / f"{index}.yaml").write_text(preset("rtn").updated(group_size=64, bits=bits).yaml())
        (folder / f"{index}.output").write_text(f"out-{bits}\n")
    return folder


def command(model: Path, recipes: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "lowbit.deploy.job_entry", "--model", str(model), "--recipes", str(recipes),
            "--output", str(output), "--", "--device", "cpu", "--no-verify", "--quiet"]  # fmt: skip


def test_index_picks_the_recipe_and_a_retry_does_nothing(tiny_llama: Path, recipes: Path, tmp_path: Path) -> None:
    variables = {**os.environ, "JOB_COMPLETION_INDEX": "1"}
    words = command(tiny_llama, recipes, tmp_path)
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out-4/lowbit.json").read_text())["recipe"]["bits"] == 4
    assert is_done(tmp_path / "out-4", recipes / "1.yaml")
    assert not is_done(tmp_path / "out-4", recipes / "0.yaml")
    again = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60)
    assert (again.returncode, "nothing to do" in again.stderr) == (0, True)


def test_wrong_flags_end_with_the_code_that_is_not_retried(tiny_llama: Path, recipes: Path, tmp_path: Path) -> None:
    words = [*command(tiny_llama, recipes, tmp_path), "--nonsense"]
    assert subprocess.run(words, capture_output=True, timeout=60).returncode == 2
    variables = {**os.environ, "JOB_COMPLETION_INDEX": "7"}
    done = subprocess.run(
        command(tiny_llama, recipes, tmp_path), env=variables, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, "7.yaml" in done.stderr) == (2, True)


def test_sigterm_ends_the_child(recipes: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "model"
    fifo.mkdir()
    os.mkfifo(fifo / "config.json")  # reading it waits for ever
    (fifo / "model.safetensors").write_bytes(b"")
    process = subprocess.Popen(command(fifo, recipes, tmp_path), stderr=subprocess.DEVNULL)
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
