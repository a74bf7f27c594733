"""`lowbit env`, through its typer application."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowbit import environments
from lowbit.commands.env import app
from lowbit.core.errors import SideEnvironmentError
from lowbit.environments import Progress
from lowbit.locks.state import STATE_FILE, State, write_state

runner = CliRunner()


def fake(root: Path, name: str, state: State) -> Path:
    (root / name).mkdir(parents=True)
    write_state(root / name, state)
    return root / name


def test_list_shows_every_state(tmp_path: Path) -> None:
    specs = environments.known()
    fake(tmp_path, "vllm-cpu", State(specs["vllm-cpu"].fingerprint, ("create", "torch")))
    fake(tmp_path, "llm-compressor", State("of another lock", ("create",), ready=True, size_mib=5))
    fake(tmp_path, "forgotten", State("x", ready=True, size_mib=1234))
    ready = fake(tmp_path, "gguf-convert", State(specs["gguf-convert"].fingerprint, ready=True, size_mib=1100))
    (ready / "bin").mkdir()
    (ready / "bin" / "python").touch()
    result = runner.invoke(app, ["list", "--json", "--root", str(tmp_path)])
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "auto-round": "missing",
        "gguf-convert": "ready",
        "gptqmodel": "missing",
        "hqq": "missing",
        "llm-compressor": "stale",
        "vllm-cpu": "partial",
        "forgotten": "unknown",
    }
    assert rows["gguf-convert"]["path"] == str(ready)
    lines = runner.invoke(app, ["list", "--root", str(tmp_path)]).stdout.splitlines()
    assert lines[0].split()[:3] == ["NAME", "STATE", "MiB"]
    assert lines[-1].split()[:3] == ["forgotten", "unknown", "1,234"]


def test_remove_deletes_only_with_yes(tmp_path: Path) -> None:
    target = fake(tmp_path, "forgotten", State("x"))
    refused = runner.invoke(app, ["remove", "forgotten", "--root", str(tmp_path)])
    assert isinstance(refused.exception, SideEnvironmentError)
    assert (target / STATE_FILE).exists()
    done = runner.invoke(app, ["remove", "forgotten", "--yes", "--root", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (0, "forgotten was removed\n")
    assert not target.exists()
    again = runner.invoke(app, ["remove", "forgotten", "--yes", "--root", str(tmp_path)])
    assert isinstance(again.exception, SideEnvironmentError)


def test_add_prints_steps_on_stderr_and_the_result_on_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(name: str, root: Path, progress: Callable[[Progress], None], torch_index: str | None) -> Path:
        assert (name, root, torch_index) == ("vllm-cpu", tmp_path, "https://example.org")
        progress(Progress(0, 0, "wait", "another process is at work on it"))
        progress(Progress(1, 2, "torch"))
        progress(Progress(1, 2, "torch", "Collecting [torch]"))
        return root / "vllm-cpu" / "bin" / "python"

    monkeypatch.setattr(environments, "add", add)
    options = ["add", "vllm-cpu", "--root", str(tmp_path), "--torch-index", "https://example.org"]
    result = runner.invoke(app, options)
    assert result.stdout == f"vllm-cpu is ready: {tmp_path}/vllm-cpu/bin/python\n"
    assert result.stderr.splitlines() == ["vllm-cpu another process is at work on it", "vllm-cpu 1/2 torch"]
    quiet = runner.invoke(app, [*options, "--quiet"])
    assert (quiet.stdout, quiet.stderr) == ("", "")


@pytest.mark.parametrize("verb", ["add", "list", "remove"])
def test_help_has_examples(verb: str) -> None:
    assert f"lowbit env {verb}" in runner.invoke(app, [verb, "--help"]).stdout
