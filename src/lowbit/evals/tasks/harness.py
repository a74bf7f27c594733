"""One lm-eval task on one engine: the score exactly as lm-eval computes it, and every item's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowbit.core.errors import EvaluationError
from lowbit.evals.statistics import Paired, paired, pooled_error, standard_error
from lowbit.evals.tasks.catalogue import Leaf, libraries_silent

_RATIOS = ("word_perplexity", "byte_perplexity", "perplexity")


@dataclass
class LeafResult:
    """scores: every metric as lm-eval gives it. items: the primary metric of each item, in order; of a perplexity, its
    negative log-likelihood over the mean count of words, so that their mean is the logarithm of the score. answers: what
    the model chose or said. seconds: that it took."""

    name: str
    metric: str
    higher_is_better: bool
    shots: int
    scores: dict[str, float]
    items: list[float]
    answers: list[Any]
    seconds: float = 0.0
    version: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(self.__dict__)


@dataclass
class TaskScore:
    """A task for the table: leaves together. error: standard error of the score. against: paired with the base's items."""

    name: str
    metric: str
    higher_is_better: bool
    shots: int
    n: int
    score: float
    error: float
    base_score: float | None = None
    against: Paired | None = None
    changed_answers: float | None = None
    leaves: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        content = {name: value for name, value in self.__dict__.items() if value is not None}
        return content | ({"against": self.against.to_dict()} if self.against else {})


def run_leaf(task: Any, leaf: Leaf, model: Any) -> LeafResult:
    """Evaluate lm-eval's task object on an lm-eval model. Raises EvaluationError for a task without items."""
    from lm_eval.evaluator import evaluate

    with libraries_silent():
        done = evaluate(
            lm=model, task_dict={"tasks": {leaf.name: task}}, limit=leaf.limit, bootstrap_iters=0, log_samples=True
        )
    samples = done["samples"][leaf.name]
    if not samples:
        raise EvaluationError(f"{leaf.name} has no items")
    first = samples[0]["filter"]
    kept = sorted((sample for sample in samples if sample["filter"] == first), key=lambda sample: int(sample["doc_id"]))
    scores = {
        name.removesuffix(",none"): float(value)
        for name, value in done["results"][leaf.name].items()
        if isinstance(value, (int, float)) and "stderr" not in name and not isinstance(value, bool)
    }
    scores.pop("sample_len", None)
    items = [sample[leaf.primary] for sample in kept]
    return LeafResult(
        leaf.name,
        leaf.primary,
        leaf.higher_is_better,
        leaf.shots,
        scores,
        _ratio_items(items) if leaf.primary in _RATIOS else [float(value) for value in items],
        [_answer(task, sample, leaf.primary) for sample in kept],
        version=str((leaf.config.get("metadata") or {}).get("version", "")),
    )


def _ratio_items(items: Sequence[tuple[float, float]]) -> list[float]:
    mean = math.fsum(count for _, count in items) / len(items)
    return [-likelihood / mean for likelihood, _ in items]


def _answer(task: Any, sample: dict[str, Any], metric: str) -> Any:
    """The index of the choice that the metric took, or the text that was generated; None where nothing was chosen."""
    responses = sample["filtered_resps"]
    if task.OUTPUT_TYPE == "multiple_choice":
        values = [float(response[0]) for response in responses]
        if metric == "acc_norm":
            choices = task.doc_to_choice(sample["doc"])
            values = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        return max(range(len(values)), key=values.__getitem__)
    if task.OUTPUT_TYPE == "generate_until":
        return str(responses[0])
    return None


def together(name: str, leaves: Sequence[LeafResult], base: Sequence[LeafResult] | None = None) -> TaskScore:
    """Leaves of one task as one score, each item counting the same, beside the base's leaves in the same order."""
    first = leaves[0]
    items = [value for leaf in leaves for value in leaf.items]
    ratio = first.metric in _RATIOS
    mean = math.fsum(items) / len(items)
    sizes = [len(leaf.items) for leaf in leaves]
    # within each leaf, as lm-eval; a leaf with one item tells nothing of its spread
    error = (
        pooled_error([standard_error(leaf.items) for leaf in leaves], sizes)
        if len(leaves) > 1 and min(sizes) > 1
        else standard_error(items)
    )
    score = math.exp(mean) if ratio else mean
    result = TaskScore(
        name, first.metric, first.higher_is_better, first.shots, len(items), score, error * (score if ratio else 1.0)
    )
    if len(leaves) > 1:
        result.leaves = {leaf.name: math.fsum(leaf.items) / len(leaf.items) for leaf in leaves}
    if base is not None:
        others = [value for leaf in base for value in leaf.items]
        result.against = paired(items, others, higher_is_better=first.higher_is_better)
        result.base_score = math.fsum(others) / len(others)
        if ratio:
            _unlog(result)
        pairs = [
            (mine, other)
            for leaf, right in zip(leaves, base, strict=True)
            for mine, other in zip(leaf.answers, right.answers, strict=True)
            if mine is not None
        ]
        if pairs:
            result.changed_answers = sum(mine != other for mine, other in pairs) / len(pairs)
    return result


def _unlog(result: TaskScore) -> None:
    """Turn a comparison of logarithms of perplexities into one of perplexities."""
    from dataclasses import replace

    from lowbit.evals.statistics import recovery_percent, verdict

    assert result.against is not None
    assert result.base_score is not None
    base = result.base_score = math.exp(result.base_score)
    against = result.against
    recovery = recovery_percent(result.score, base, higher_is_better=False)
    result.against = replace(
        against,
        difference=result.score - base,
        low=base * math.expm1(against.low),
        high=base * math.expm1(against.high),
        recovery=recovery,
        verdict=verdict(-against.difference, against.p_value, recovery),
    )
