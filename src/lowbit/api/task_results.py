"""Results of lm-eval's tasks for one model on one engine: kept ones, and the rest run and kept one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lowbit.api.engines import IN_PROCESS, Answering, is_url
from lowbit.core.contracts import Checkpoint
from lowbit.core.progress import Progress
from lowbit.evals.store import ResultStore
from lowbit.evals.tasks.catalogue import Leaf, build
from lowbit.evals.tasks.endpoint import Endpoint, endpoint_engine
from lowbit.evals.tasks.engines import transformers_engine
from lowbit.evals.tasks.harness import LeafResult, run_leaf
from lowbit.evals.tasks.local_data import LocalData
from lowbit.formats.reader import open_artifact


@dataclass(frozen=True)
class Subject:
    """A model under test. checkpoint: None for a server alone. runtime: what it runs on. server: starts it, or reaches it,
    unless it runs in this process. dtype: that it computes in here. longest: tokens of a prompt that a server takes."""

    checkpoint: Checkpoint | None
    runtime: str
    server: Callable[[], AbstractContextManager[Answering]]
    dtype: torch.dtype
    longest: int


class TaskResults:
    """What all subjects have in common: the tasks, their data, the tokenizer, and where results are kept.

    packed: whether models in this process compute what prompts have in common once; None: those in float32.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        data: LocalData | None,
        tokenizer: Any,
        store: ResultStore,
        device: torch.device,
        batch_size: int,
        *,
        packed: bool | None = None,
    ) -> None:
        self.leaves, self.data, self.tokenizer, self.store = leaves, data, tokenizer, store
        self.device, self.batch_size, self.packed = device, batch_size, packed
        self.digests = {leaf.name: data.digest(leaf.name) for leaf in leaves} if data else {}

    def of(self, subject: Subject, progress: Progress, title: str, *, rerun: bool) -> dict[str, LeafResult]:
        """Every leaf's result by name. rerun: also those that are kept. Raises LowbitError subclasses; what finished before
        is kept."""
        with ExitStack() as stack:
            endpoint = None
            if is_url(subject.runtime):  # only the server itself can say what it serves
                endpoint = stack.enter_context(subject.server()).endpoint
            keys = {leaf.name: self._key(leaf, subject, endpoint) for leaf in self.leaves}
            kept = {} if rerun else {name: self.store.get(key) for name, key in keys.items()}
            results = {name: result for name, result in kept.items() if result is not None}
            missing = [leaf for leaf in self.leaves if leaf.name not in results]
            if not missing:
                return results
            progress.start(title, len(missing))
            if endpoint is None and subject.runtime != IN_PROCESS:
                endpoint = stack.enter_context(subject.server()).endpoint
            engine = stack.enter_context(self._engine(subject, endpoint))
            for leaf in missing:
                progress.note(leaf.name)
                started = time.monotonic()
                result = run_leaf(build(leaf, self.data), leaf, engine)
                result.seconds = round(time.monotonic() - started, 2)
                self.store.put(keys[leaf.name], result)
                results[leaf.name] = result
                progress.advance()
        return results

    def _key(self, leaf: Leaf, subject: Subject, endpoint: Endpoint | None) -> dict[str, Any]:
        """Everything that a result depends on."""
        here = [str(subject.dtype), self.device.type, self.batch_size] if subject.runtime == IN_PROCESS else []
        here += ["packed"] * (bool(here) and self._packs(subject))
        there = [endpoint.model, self._fingerprint(endpoint)] if endpoint else []
        return {
            "model": subject.checkpoint.identity() if subject.checkpoint is not None else None,
            "engine": [subject.runtime, *here, *there],
            "task": leaf.name,
            "version": str(leaf.config.get("metadata")),
            "shots": leaf.shots,
            "limit": leaf.limit,
            "data": self.digests.get(leaf.name, "hub"),
            "lm_eval": lm_eval_version(),
        }

    def _packs(self, subject: Subject) -> bool:
        return subject.dtype == torch.float32 if self.packed is None else self.packed

    def _fingerprint(self, endpoint: Endpoint) -> str:
        """What the served model makes of a text: another model at the same address is noticed."""
        ids = self.tokenizer("The capital of France is Paris.").input_ids
        return f"{endpoint.score(ids[:2], ids[2:])[0]:.3f}"

    @contextmanager
    def _engine(self, subject: Subject, endpoint: Endpoint | None) -> Iterator[Any]:
        if endpoint is not None:
            yield endpoint_engine(endpoint, self.tokenizer, context=subject.longest)
            return
        assert subject.checkpoint is not None
        dense = open_artifact(subject.checkpoint, subject.dtype)
        with transformers_engine(
            dense,
            self.tokenizer,
            self.device,
            subject.dtype,
            batch_size=self.batch_size,
            packed=self._packs(subject),
        ) as engine:
            yield engine


def lm_eval_version() -> str:
    """Of the installed lm-eval; empty without."""
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        return ""
