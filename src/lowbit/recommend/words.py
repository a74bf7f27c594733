"""What a recommendation says, in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Text:
    """One sentence in two languages, and where it comes from ("" for arithmetic)."""

    en: str
    zh: str
    source: str = ""

    def say(self, language: str) -> str:
        """In "en" or "zh"."""
        return self.zh if language == "zh" else self.en


def text(key: str, source: str = "", **values: object) -> Text:
    """The sentence of words.yaml called `key`, filled in."""
    entry = _words()[key]
    return Text(entry["en"].format(**values), entry["zh"].format(**values), source)


def amount(nbytes: float) -> str:
    """ "3.6 GiB", or "210 MiB" of less than one."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"


@cache
def _words() -> dict[str, dict[str, str]]:
    content: dict[str, dict[str, str]] = yaml.safe_load(
        resources.files("lowbit.recommend").joinpath("words.yaml").read_text(encoding="utf-8")
    )
    return content
