"""Limits that are kept or missed, what the model itself forbids, and what would make a wish possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowbit.recommend import guide
from lowbit.recommend.candidates import Candidate, Facts, Option, Wishes
from lowbit.recommend.hardware import Hardware
from lowbit.recommend.memory import MemoryParts
from lowbit.recommend.speed import Speed
from lowbit.recommend.words import LANGUAGES, Text, amount, text


def missed(
    parts: MemoryParts, budget: int, speed: Speed, recovery: float, wishes: Wishes
) -> tuple[tuple[Text, ...], float]:
    """The limits that are not kept, and how far off they are: memory counts most, since without it nothing runs."""
    found, distance = [], 0.0
    if parts.needed > budget:
        found.append(text("memory", need=amount(parts.needed), have=amount(budget)))
        distance += 10 * parts.needed / budget + (100 - recovery) / 10
    if wishes.min_recovery is not None and recovery < wishes.min_recovery:
        found.append(text("recovery", have=recovery, want=wishes.min_recovery))
        distance += (wishes.min_recovery - recovery) / 10
    if wishes.min_tokens_per_s is not None and speed.decode < wishes.min_tokens_per_s:
        found.append(text("slow", have=speed.decode, want=wishes.min_tokens_per_s))
        distance += wishes.min_tokens_per_s / speed.decode - 1
    return tuple(found), distance


def split(option: Option, facts: Facts, runtime: str, hardware: Hardware) -> tuple[Hardware, Text | None]:
    """The devices that the runtime can divide the model over, the most of them, and what is to be said when not all."""
    why = indivisible(option, facts, runtime, hardware)
    if why is None:
        return hardware, None
    fewer = (replace(hardware, devices=count) for count in range(hardware.devices - 1, 0, -1))
    used = next(part for part in fewer if indivisible(option, facts, runtime, part) is None)
    note = {language: why.say(language) for language in LANGUAGES}
    english = text("part", why=note["en"], used=used.devices, count=hardware.devices).en
    return used, Text(english, text("part", why=note["zh"], used=used.devices, count=hardware.devices).zh)


def indivisible(option: Option, facts: Facts, runtime: str, hardware: Hardware) -> Text | None:
    """Why tensor parallelism cannot split the model over the devices; llama.cpp splits by layers, which always goes."""
    count, shape = hardware.devices, facts.shape
    if count == 1 or runtime == "llama.cpp":
        return None
    if shape.heads % count or shape.hidden % count or (shape.kv_heads % count and count % shape.kv_heads):
        return text("heads", heads=shape.heads, keys=shape.kv_heads, count=count)
    if option.groups and (shape.intermediate // count) % option.groups:
        return text("groups", size=option.groups, count=count, width=shape.intermediate)
    return None


def model_notes(facts: Facts, option: Option, runtime: str) -> tuple[Text, ...]:
    """What is special about this model."""
    notes = []
    if option.method in ("bf16", "fp16"):
        return ()
    if runtime != "llama.cpp" and facts.ends > 0.25:
        notes.append(text("ends", share=100 * facts.ends))
    if guide.loss_factor(facts.parameters) > 1:
        notes.append(text("small", "docs/accuracy.md"))
    return tuple(notes)


def advice(facts: Facts, hardware: Hardware, wishes: Wishes, candidates: Sequence[Candidate]) -> tuple[Text, ...]:
    """What would make the impossible possible, from candidates of which none keeps all limits, nearest first."""
    nearest, found = candidates[0], []
    method = nearest.option.method
    if not nearest.fits:
        if nearest.context:
            found.append(text("shorter", method=method, context=nearest.context))
        if nearest.concurrency:
            found.append(text("fewer", method=method, concurrency=nearest.concurrency))
        share = guide.usable_share(hardware)
        count = -(-nearest.parts.needed // int(hardware.memory * share))
        memory = nearest.parts.needed
        if wishes.max_memory is not None and nearest.parts.needed <= hardware.total_memory * share:
            found.append(text("raised", method=method, memory=f"{memory // 2**20 + 1}MiB"))
        else:
            larger = "larger" if hardware.kind == "gpu" else "more"  # boards and computers do not add up
            found.append(text(larger, method=method, memory=amount(memory / share), count=count, name=hardware.name))
    if wishes.min_tokens_per_s is not None and nearest.speed.decode < wishes.min_tokens_per_s:
        need = hardware.bandwidth * wishes.min_tokens_per_s / nearest.speed.decode / 1e9
        have = hardware.bandwidth / 1e9
        found.append(text("bandwidth", want=wishes.min_tokens_per_s, method=method, need=need, have=have))
    fitting = [candidate for candidate in candidates if candidate.fits]
    if wishes.min_recovery is not None and fitting:
        best = max(fitting, key=lambda candidate: candidate.recovery)
        if best.recovery < wishes.min_recovery:
            found.append(text("accurate", method=best.option.method, have=best.recovery))
    return tuple(found)
