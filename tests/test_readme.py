"""The two READMEs show the same commands, and the commands are real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
import yaml

from lowbit.cli import app
from lowbit.recipe import Recipe

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"


def blocks(file: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", file.read_text(), re.MULTILINE | re.DOTALL)


def test_both_languages_show_the_same_code() -> None:
    assert len(blocks(ENGLISH)) >= 5
    assert blocks(ENGLISH) == blocks(CHINESE)


def shown_commands() -> list[str]:
    text = ENGLISH.read_text() + CHINESE.read_text()
    inline = re.findall(r"`(lowbit [^`]+)`", text)
    fenced = [line for _, block in blocks(ENGLISH) for line in block.splitlines() if line.startswith("lowbit ")]
    return sorted(set(inline + fenced))


@pytest.mark.parametrize("command", shown_commands())
def test_commands_parse(command: str) -> None:
    """Every verb and flag in the READMEs exists; nothing is run."""
    verb, words = typer.main.get_command(app), command.split()[1:]
    while hasattr(verb, "commands"):
        assert words[0] in verb.commands, f"no verb {words[0]!r}"
        verb, words = verb.commands[words[0]], words[1:]
    verb.make_context("lowbit", words)


def test_recipes_are_recipes() -> None:
    shown = [text for language, text in blocks(ENGLISH) if language == "yaml"]
    assert shown
    for text in shown:
        Recipe.parse(yaml.safe_load(text))


def test_linked_files_exist() -> None:
    for file in (ENGLISH, CHINESE):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", file.read_text()):
            assert (ROOT / target).exists(), f"{file.name} links to {target}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)$", ENGLISH.read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile
