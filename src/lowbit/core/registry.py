"""Parts by name, imported when they are asked for; other packages add theirs by an entry point, without a fork."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from lowbit.core.errors import LowbitError, RecipeError, did_you_mean


class Registry:
    """Names of one kind of part ("method", "format", "transform", "runtime") -> objects.

    own: name -> "module:attribute". Entry points of group `lowbit.<kind>s` add to it.
    """

    def __init__(self, kind: str, own: Mapping[str, str], error: type[LowbitError] = RecipeError) -> None:
        self.kind, self.error = kind, error
        self._own = dict(own)

    def names(self) -> list[str]:
        """All names that `get` knows, sorted."""
        return sorted({*self._own, *(point.name for point in self._foreign())})

    def get(self, name: str) -> Any:
        """The part of that name. Raises `error` with the nearest name."""
        if name in self._own:
            module, _, attribute = self._own[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        for point in self._foreign():
            if point.name == name:
                return point.load()
        raise self.error(
            f"{self.kind} {name!r} is unknown{did_you_mean(name, self.names())}",
            hint=f"one of {', '.join(self.names())}",
        )

    def _foreign(self) -> Any:
        return entry_points(group=f"lowbit.{self.kind}s")
