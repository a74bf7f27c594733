"""Calibration text: sources, windows, and errors that say how much there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lowbit.core.errors import CalibrationError
from lowbit.core.text import documents, first_windows, token_windows, windows_digest


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def test_windows_are_pieces_of_the_text_without_overlap(tokenizer: Any) -> None:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(text).input_ids)
    windows = token_windows("pydoc", tokenizer, 20, 50, seed=3)
    pieces = {tuple(piece.tolist()) for piece in ids[: len(ids) // 50 * 50].view(-1, 50)}
    drawn = [tuple(window.tolist()) for window in windows]
    assert set(drawn) <= pieces
    assert len(set(drawn)) == 20


def test_a_longer_draw_begins_with_the_shorter_one(tokenizer: Any) -> None:
    longer = token_windows("pydoc", tokenizer, 30, 64, seed=1)
    assert torch.equal(longer[:10], token_windows("pydoc", tokenizer, 10, 64, seed=1))
    assert not torch.equal(longer[:10], token_windows("pydoc", tokenizer, 10, 64, seed=2))


def test_digest_follows_the_tokens() -> None:
    tokens = torch.arange(6).view(2, 3)
    assert windows_digest(tokens) == windows_digest(tokens.to(torch.int32))
    assert windows_digest(tokens) != windows_digest(tokens.flip(0))


def test_local_files(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("plain text")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "c.csv").write_text("id,body\n1,first\n2,second\n")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": chat}))

    def read(name: str) -> list[str]:
        return list(documents(str(tmp_path / name), tokenizer))

    assert read("a.txt") == ["plain text"]
    assert read("b.jsonl") == ["one", "two"]
    assert read("c.csv:body") == ["first", "second"]
    assert read("d.jsonl") == ["user: hi\nassistant: ho\n"]


def test_mixtures_share_the_windows(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("zebra " * 2000)
    mixed = token_windows(f"pydoc+{tmp_path}/a.txt", tokenizer, 5, 32)
    alone = token_windows("pydoc", tokenizer, 3, 32)
    assert torch.equal(mixed[:3], alone)
    assert "zebra" in tokenizer.decode(mixed[3])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{broken', "line 2 is not JSON"),
        ("a.jsonl", '{"x": 1}', "has none of text"),
        ("a.jsonl:body", '{"x": 1}', "no column 'body'"),
        ("a.txt", "few", "is 0 windows of 16; 4 were asked for"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("gone.txt", None, "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, tokenizer: Any, name: str, content: str | bytes | None, message: str) -> None:
    file = tmp_path / name.partition(":")[0]
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        first_windows(str(tmp_path / name), tokenizer, 4, 16)


def test_unknown_set_suggests_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="did you mean 'wikitext'"):
        token_windows("wikitxt", tokenizer, 4, 16)
