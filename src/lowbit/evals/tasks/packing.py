"""Prompts packed into rows so that what they have in common is computed once.

The endings of a multiple-choice question share its text, and the questions of a task share its examples. A row holds groups
of prompts, each group as its common beginning followed by the rest of each prompt; a mask lets every token see its own
prompt only, and positions count from each prompt's beginning. Medusa (arXiv:2401.10774, section 2.1.2) verifies its
candidates by the same tree attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# a group's row may be this many times its common beginning: longer ones repeat it less, but masked attention grows faster
_BEGINNINGS = 3


@dataclass(frozen=True)
class Prompt:
    """Input tokens of a model. scored: the first position whose prediction is wanted; all after it are too."""

    tokens: tuple[int, ...]
    scored: int


@dataclass
class Row:
    """Packed prompts. tokens, positions: of equal length. spans: for each group, its beginning and its endings as (start,
    stop). places: prompt's index -> its scored positions as (start, stop) in the row."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    spans: list[tuple[tuple[int, int], list[tuple[int, int]]]] = field(default_factory=list)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)

    def mask(self) -> Tensor:
        """[tokens, tokens] bool: whether the row's token sees the column's."""
        sees = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for beginning, endings in self.spans:
            for start, stop in [beginning, *endings]:
                sees[start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            for start, stop in endings:
                sees[start:stop, slice(*beginning)] = True
        return sees

    def add(self, group: Group, prompts: Sequence[Prompt]) -> None:
        """Append a group."""
        shared = group.shared
        beginning = self._append(prompts[group.members[0]].tokens[:shared], 0)
        endings = []
        for member in group.members:
            prompt = prompts[member]
            start, stop = self._append(prompt.tokens[shared:], shared)
            endings.append((start, stop))
            self.places[member] = (start + prompt.scored - shared, stop)
        self.spans.append((beginning, endings))

    def _append(self, tokens: Sequence[int], position: int) -> tuple[int, int]:
        start = len(self.tokens)
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        return start, len(self.tokens)


@dataclass
class Group:
    """Prompts by index, whose first `shared` tokens are the same and not scored. length: of all, packed."""

    members: list[int]
    shared: int
    length: int


def pack(prompts: Sequence[Prompt], row_tokens: int) -> list[Row]:
    """Every prompt in one of the rows, each of about `row_tokens` at most unless a prompt, or a long common beginning, asks
    for more; the longest groups first."""
    rows: list[Row] = []
    for group in sorted(_groups(prompts, row_tokens), key=lambda group: -group.length):
        row = next((row for row in rows if len(row.tokens) + group.length <= row_tokens), None)
        if row is None:
            row = Row()
            rows.append(row)
        row.add(group, prompts)
    return rows


def _groups(prompts: Sequence[Prompt], row_tokens: int) -> list[Group]:
    """In lexicographic order, neighbours share most: each joins the group before it when they share the better part."""
    groups: list[Group] = []
    for index in sorted(range(len(prompts)), key=lambda index: prompts[index].tokens):
        prompt = prompts[index]
        if groups:
            last = groups[-1]
            shared = min(_common(prompts[last.members[0]].tokens, prompt.tokens), prompt.scored, last.shared)
            count = len(last.members)
            length = last.length + (last.shared - shared) * (count - 1) + len(prompt.tokens) - shared
            much = 2 * shared >= max(last.shared, prompt.scored) and shared * count > last.shared * (count - 1)
            if much and length <= max(row_tokens, _BEGINNINGS * shared):
                last.members.append(index)
                last.shared, last.length = shared, length
                continue
        groups.append(Group([index], prompt.scored, len(prompt.tokens)))
    return groups


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
