"""What people type on a command line, turned into values. Raises RecipeError that shows how it is written."""

from __future__ import annotations

import re
from typing import Any

from lowbit.core.errors import RecipeError


def parse_options(pairs: list[str]) -> dict[str, Any]:
    import yaml

    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--option {pair!r} is not NAME=VALUE", hint="such as --option percdamp=0.05")
        options[name.strip().replace("-", "_")] = yaml.safe_load(value)
    return options


def parse_alpha(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise RecipeError(f"--alpha {text!r} is not a number from 0 to 1", hint="such as 0.5, or auto")
    return share


def parse_group_size(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if text in ("channel", "-1"):
        return 0
    if not text.isdigit():
        raise RecipeError(f"--group-size {text!r} is not a number", hint="such as 128, 0 for one scale a row, or auto")
    return int(text)


def parse_bytes(text: str | None) -> int | None:
    """ "2GiB", "500MB", "1000000" -> bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise RecipeError(f"{text!r} is not an amount of memory", hint="such as 2GiB or 500MB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
