"""What is asked for and what could be chosen: the words that the engine and its limits share."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowbit.recommend.memory import Load, MemoryParts
from lowbit.recommend.shape import ModelShape
from lowbit.recommend.speed import Speed
from lowbit.recommend.words import Text


@dataclass(frozen=True)
class Option:
    """A method with the size it gives. embedding: bytes of the input embedding, of which a token reads one row, 0 where it
    is the output matrix too. groups: columns that share a scale, 0 for none that matter. problem: why quantizing would
    refuse. present: the model is quantized so already."""

    method: str
    file: int = 0
    weights: int = 0
    repacked: int = 0
    embedding: int = 0
    flags: str = ""
    groups: int = 0
    problem: Text | None = None
    present: bool = False


@dataclass(frozen=True)
class Wishes:
    """What is asked for; a load with a context of 0 means 4,096 tokens or what the model has.

    max_memory: bytes. min_recovery: percent. min_tokens_per_s: decoded, of one request.
    """

    load: Load = field(default_factory=Load)
    max_memory: int | None = None
    min_recovery: float | None = None
    min_tokens_per_s: float | None = None


@dataclass(frozen=True)
class Facts:
    """The model. parameters: all; active: those a token visits; share16: of the weights in embedding and head."""

    name: str
    shape: ModelShape
    parameters: int
    active: int
    ends: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A method in a runtime, with its predicted numbers. misses: limits that it does not keep, in words; distance: how far
    it is from keeping them. budget: bytes that serving may take on the `devices` that are used."""

    option: Option
    runtime: str
    parts: MemoryParts
    budget: int
    speed: Speed
    recovery: float
    reasons: tuple[Text, ...]
    notes: tuple[Text, ...]
    misses: tuple[Text, ...]
    distance: float
    context: int
    concurrency: int
    devices: int = 1

    @property
    def fits(self) -> bool:
        """Whether serving stays within the memory."""
        return self.parts.needed <= self.budget


@dataclass(frozen=True)
class RuledOut:
    """What is not recommended, and the sentence that says why."""

    method: str
    runtime: str
    text: Text
