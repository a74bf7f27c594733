"""One tree for two outputs: Kubernetes objects whose knobs are leaves that know their name and their default.

`resolve` puts values in, which gives plain objects; `lowbit.deploy.helm` writes the same tree as a chart's template. So
the chart and the Kustomize base cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Tree = Any  # dict, list, scalar or one of the leaves below
Objects = list[dict[str, Any]]


@dataclass(frozen=True)
class Value:
    """A knob: `path` in the chart's values ("image.tag"), its default and what it is for. An empty list or mapping leaves
    the entry out."""

    path: str
    default: Any
    text: str = ""


@dataclass(frozen=True)
class Release:
    """The name of the whole deployment, and a suffix."""

    suffix: str = ""


@dataclass(frozen=True)
class Text:
    """Strings, knobs and names, one after the other."""

    parts: tuple[str | Value | Release, ...]


@dataclass(frozen=True)
class When:
    """An entry of a mapping or an item of a list that is there only when the knob is on (off, with `negate`)."""

    path: str
    default: bool
    then: Tree
    negate: bool = False
    text: str = ""


@dataclass(frozen=True)
class Template:
    """One object in a file of its own; `when`: the knob that it hangs on, and its default."""

    file: str
    tree: Tree
    when: tuple[str, bool] | None = None


_ABSENT = object()


def resolve(tree: Tree, name: str, values: Mapping[str, Any] | None = None) -> Any:
    """The tree as plain data. name: of the release. values: path -> value, instead of the defaults."""
    found = _resolve(tree, name, values or {})
    return None if found is _ABSENT else found


def objects(templates: list[Template], name: str, values: Mapping[str, Any] | None = None) -> Objects:
    """All objects that are switched on, plain."""
    given = values or {}
    wanted = [template for template in templates if template.when is None or given.get(*template.when)]
    return [resolve(template.tree, name, given) for template in wanted]


def _resolve(tree: Tree, name: str, values: Mapping[str, Any]) -> Any:
    if isinstance(tree, Value):
        found = values.get(tree.path, tree.default)
        return _ABSENT if found in ({}, []) else found
    if isinstance(tree, Release):
        return name + tree.suffix
    if isinstance(tree, Text):
        return "".join(str(_resolve(part, name, values)) for part in tree.parts)
    if isinstance(tree, When):
        on = bool(values.get(tree.path, tree.default)) != tree.negate
        return _resolve(tree.then, name, values) if on else _ABSENT
    if isinstance(tree, Mapping):
        pairs = ((key, _resolve(value, name, values)) for key, value in tree.items())
        return {key: value for key, value in pairs if value is not _ABSENT}
    if isinstance(tree, list | tuple):
        return [value for value in (_resolve(item, name, values) for item in tree) if value is not _ABSENT]
    return tree


def leaves(tree: Tree) -> Iterator[Value | When]:
    """Every knob of a tree, in the order of the tree."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, Text):
        yield from (part for part in tree.parts if isinstance(part, Value))
    elif isinstance(tree, When):
        yield tree
        yield from leaves(tree.then)
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from leaves(item)
