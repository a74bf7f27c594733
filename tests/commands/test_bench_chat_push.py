"""bench and chat against a stub and a real model; push without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowbit.api.push import push, push_plan
from lowbit.core.errors import CheckpointError, OutputError, RecipeError
from tests.commands.serving import run
from tests.in_process import Run
from tests.runtimes.stub_server import stub


@pytest.fixture
def here(lowbit_here: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """lowbit_here, where nobody's servers and files are."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lowbit_here


def test_bench_of_a_running_server(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_API_KEY", "secret")
    with stub(key="secret") as (url, _):
        done = here("bench", url, "--concurrency", "1,2", "--num-requests", "4", "--output-len", "3", "--json")
        shown = here("bench", url, "--concurrency", "1", "--num-requests", "2", "--markdown", "--quiet")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["load"]["concurrency"], row["load"]["output_tokens"]) for row in rows] == [(1, 12), (2, 12)]
    assert shown.stdout.startswith("| artifact | runtime | clients | tokens/s |")
    assert len(shown.stdout.splitlines()) == 3
    wrong = here("bench", url, "--concurrency", "one")
    assert wrong.returncode == 2
    assert "such as 1,4,16" in wrong.stderr


def test_bench_of_an_artifact_is_kept_for_predictions(smollm2_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    file = tmp_path / "m.gguf"
    shutil.copy(smollm2_gguf, file)
    (tmp_path / "m.lowbit-eval.json").write_text(json.dumps({"artifact": str(file), "base": "b", "tasks": {"t": 1}}))
    done = run(tmp_path, "bench", file, "--concurrency", "2,1", "--num-requests", "2", "--input-len", "16",
               "--output-len", "4", "--threads", "1", "--json", XDG_DATA_HOME=str(tmp_path / "data"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    row, alone = json.loads(done.stdout)
    assert row["runtime"] == "llama.cpp"
    assert row["load"]["output_tokens"] == 8  # the end of text does not end an answer here
    assert 12 <= row["load"]["prompt_tokens"] / 2 <= 20
    assert row["memory_mib"] > 90  # the weights alone
    assert row["load"]["ttft"]["p50"] > 0
    kept = json.loads((tmp_path / "data/lowbit/bench.jsonl").read_text().splitlines()[0])
    assert kept["runtime"] == "llama.cpp"
    assert kept["decode_tokens_per_s"] > 0
    assert (kept["context"], kept["concurrency"]) == (20, 2)
    told = json.loads((tmp_path / "m.lowbit-eval.json").read_text())
    assert told["speed"]["time_to_first_token"] == alone["load"]["ttft"]["mean"]
    assert told["tasks"] == {"t": 1}


def test_chat_asks_and_remembers(here: Run) -> None:
    with stub() as (url, asked):
        done = here("chat", url.removesuffix("/v1"), "-a", "hello", "-a", "again", "--max-tokens", "3",
                   "--system", "be brief")  # fmt: skip
    assert done.stdout == "one two three\none two three\n"
    assert [message["content"] for message in asked[-1]["messages"]] == ["be brief", "hello", "one two three", "again"]


def test_chat_with_two(here: Run) -> None:
    with stub() as (first, _), stub() as (second, _):
        done = here("chat", "--compare", first, second, "-a", "hello", "--max-tokens", "2")
    assert done.stdout == f"[{first}]\none two\n\n[{second}]\none two\n\n"


def test_chat_with_nobody(here: Run) -> None:
    done = here("chat")
    assert done.returncode == 1
    assert "no server runs" in done.stderr
    assert "nobody answers" in here("chat", "http://127.0.0.1:9/v1", "-a", "hello").stderr


@pytest.fixture
def artifact(tiny_llama: Path, tmp_path: Path) -> Path:
    """A directory with a record, a hidden file and one that was broken off."""
    import hashlib

    folder = tmp_path / "artifact"
    shutil.copytree(tiny_llama, folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "lowbit.json").write_text(json.dumps({"checksums": {"model.safetensors": digest}}))
    (folder / "README.md").write_text("card")
    (folder / ".cache").mkdir()
    (folder / ".cache/x").write_text("x")
    (folder / "model.part").write_text("x")
    return folder


def test_push_shows_files_and_sizes(here: Run, artifact: Path) -> None:
    done = here("push", artifact, "my-org/model", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    names = {file["name"] for file in plan["files"]}
    assert {"model.safetensors", "config.json", "README.md", "lowbit.json", "tokenizer.json"} <= names
    assert not {".cache/x", "model.part"} & names
    assert plan["bytes"] == sum((artifact / name).stat().st_size for name in names)
    assert (plan["verified"], plan["url"]) == (True, None)


def test_a_gguf_file_goes_with_its_card(tmp_path: Path) -> None:
    for name in ("m-Q4.gguf", "m-Q4.lowbit.json", "m-Q4.card.md", "m-Q4.Modelfile", "other.gguf"):
        (tmp_path / name).write_text("{}")
    plan = push_plan(tmp_path / "m-Q4.gguf", "a/b")
    assert [file.name for file in plan.files] == ["m-Q4.gguf", "m-Q4.lowbit.json", "README.md", "m-Q4.Modelfile"]
    for shard in ("s-00001-of-00002.gguf", "s-00002-of-00002.gguf"):
        (tmp_path / shard).write_text("x")
    assert len(push_plan(tmp_path / "s-00001-of-00002.gguf", "a/b").files) == 2


def test_what_is_not_pushed(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not the name of a repository"):
        push_plan(artifact, "just-a-name")
    with pytest.raises(CheckpointError, match="no artifact"):
        push_plan(tmp_path, "a/b")
    (artifact / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"model.safetensors in .* differ from their checksums"):
        push_plan(artifact, "a/b")


class Hub:
    """Stands where huggingface_hub.HfApi does."""

    calls: list[tuple[str, Any]]
    refuse = False

    def __init__(self, **_: object) -> None: ...

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append((repo, options))
        if self.refuse:
            raise OSError("401 Client Error: unauthorized")

    def create_commit(self, repo: str, operations: list[Any], **options: Any) -> Any:
        self.calls.append((repo, {operation.path_in_repo: operation.path_or_fileobj for operation in operations}))
        return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo}/commit/1"})


def test_push_commits_all_at_once(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = type("OwnHub", (Hub,), {"calls": []})
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    assert push(push_plan(artifact, "a/b", private=True)) == "https://huggingface.co/a/b/commit/1"
    (_, made), (_, sent) = hub.calls
    assert made["private"]
    assert made["exist_ok"]
    assert sent["model.safetensors"] == str(artifact / "model.safetensors")
    hub.refuse = True
    with pytest.raises(OutputError, match="could not be uploaded: 401") as raised:
        push(push_plan(artifact, "a/b"))
    assert "hf auth login" in (raised.value.hint or "")
