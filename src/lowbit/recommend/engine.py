"""From options with known sizes to a ranked short list: what fits, what is fast and accurate enough, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lowbit.recommend import guide
from lowbit.recommend.candidates import Candidate, Facts, Option, RuledOut, Wishes
from lowbit.recommend.guide import MethodRule
from lowbit.recommend.hardware import Hardware
from lowbit.recommend.limits import advice, missed, model_notes, split
from lowbit.recommend.memory import Load, largest_concurrency, largest_context, serving_parts
from lowbit.recommend.records import BenchRecord
from lowbit.recommend.speed import Speed, Work, general_speed, predicted_speed
from lowbit.recommend.words import Text, text

_USUAL_CONTEXT = 4096


@dataclass(frozen=True)
class Recommendation:
    """The answer. possible: whether the first keeps all limits; else the list has the nearest that can be had.

    advice: what would make it possible, or better."""

    model: Facts
    hardware: Hardware
    scenario: str
    wishes: Wishes
    ranked: tuple[Candidate, ...]
    ruled_out: tuple[RuledOut, ...]
    possible: bool
    advice: tuple[Text, ...] = field(default=())


def recommend(
    facts: Facts,
    options: Sequence[Option],
    hardware: Hardware,
    wishes: Wishes,
    scenario: str | None = None,
    earlier: Sequence[tuple[BenchRecord, Speed]] = (),
    listed: int = 4,
) -> Recommendation:
    """Rank `options` for a model on hardware; earlier: measurements beside the general rule's predictions.

    Raises RecipeError for an unknown scenario. Never empty: without anything that keeps the limits, the nearest come first.
    """
    wishes, shortened = _within_positions(facts, wishes)
    scenario = scenario or guide.pick_scenario(hardware, wishes.min_recovery)
    order = guide.preference(scenario)
    rules = guide.methods()
    candidates, ruled_out = [], []
    for option in sorted(options, key=lambda option: order.index(option.method) if option.method in order else 99):
        if option.method not in order:
            continue
        for runtime in rules[option.method].runtimes:
            verdicts = guide.verdicts(option.method, runtime, hardware)
            against = next((verdict for verdict in verdicts if verdict.effect in ("out", "hide")), None)
            if against is not None and against.effect == "hide":
                continue
            why = against.text if against else option.problem
            if why is not None:
                ruled_out.append(RuledOut(option.method, runtime, why))
                continue
            used, partly = split(option, facts, runtime, hardware)
            notes = tuple(verdict.text for verdict in verdicts) + ((partly,) if partly is not None else ())
            slower = min((verdict.speed for verdict in verdicts), default=1.0)
            candidates.append(
                _candidate(facts, option, runtime, used, wishes, scenario, rules[option.method], notes, slower, earlier)
            )
    good = [candidate for candidate in candidates if not candidate.misses]
    rest = sorted((c for c in candidates if c.misses), key=lambda candidate: candidate.distance)
    ranked = good[:listed] if good else rest[:listed]
    chosen = {id(candidate) for candidate in ranked}
    ruled_out += [
        RuledOut(c.option.method, c.runtime, c.misses[0]) for c in candidates if c.misses and id(c) not in chosen
    ]
    helpful = shortened + (advice(facts, hardware, wishes, rest) if rest and not good else ())
    possible = bool(good) and not shortened
    return Recommendation(facts, hardware, scenario, wishes, tuple(ranked), tuple(ruled_out), possible, helpful)


def _within_positions(facts: Facts, wishes: Wishes) -> tuple[Wishes, tuple[Text, ...]]:
    """The wishes with a context that the model has positions for, and what had to be changed."""
    longest = facts.shape.max_context
    if not wishes.load.context:
        usual = min(_USUAL_CONTEXT, longest or _USUAL_CONTEXT)
        return replace(wishes, load=replace(wishes.load, context=usual)), ()
    if not longest or wishes.load.context <= longest:
        return wishes, ()
    changed = text("positions", have=longest, want=wishes.load.context)
    return replace(wishes, load=replace(wishes.load, context=longest)), (changed,)


def _candidate(
    facts: Facts,
    option: Option,
    runtime: str,
    hardware: Hardware,
    wishes: Wishes,
    scenario: str,
    rule: MethodRule,
    notes: tuple[Text, ...],
    slower: float,
    earlier: Sequence[tuple[BenchRecord, Speed]],
) -> Candidate:
    load, place, devices = wishes.load, hardware.place, hardware.devices
    parts = serving_parts(option.weights, facts.shape, load, runtime, place, devices, option.repacked)
    budget = int(hardware.total_memory * guide.usable_share(hardware))
    if wishes.max_memory is not None:
        budget = min(budget, wishes.max_memory)
    speed = _speed(facts, option, rule, slower, load, runtime, hardware, earlier)
    recovery = 100 - (100 - rule.recovery) * guide.loss_factor(facts.parameters)
    misses, distance = missed(parts, budget, speed, recovery, wishes)
    own = guide.reason(scenario, option.method)
    arguments = (option.weights, facts.shape, load, runtime, place, budget, devices)
    return Candidate(
        option=option,
        runtime=runtime,
        parts=parts,
        budget=budget,
        speed=speed,
        recovery=recovery,
        reasons=(own,) if own is not None else (),
        notes=notes + model_notes(facts, option, runtime),
        misses=misses,
        distance=distance,
        context=largest_context(*arguments),
        concurrency=largest_concurrency(*arguments),
        devices=devices,
    )


def _speed(
    facts: Facts,
    option: Option,
    rule: MethodRule,
    slower: float,
    load: Load,
    runtime: str,
    hardware: Hardware,
    earlier: Sequence[tuple[BenchRecord, Speed]],
) -> Speed:
    read = (option.weights - option.embedding) * facts.active / facts.parameters
    work = Work(read, facts.active, rule.speed * slower, rule.double and hardware.place == "gpu")
    general = general_speed(work, facts.shape, load, runtime, hardware)
    return predicted_speed(general, earlier, facts.name, option.method, load, runtime, hardware)
