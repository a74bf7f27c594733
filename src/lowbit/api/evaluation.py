"""Everything that can be measured of one artifact, against its base, as one run: plain data for tables and reports."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit import __version__
from lowbit.api.engines import IN_PROCESS, Answering, answering, check_runtime, is_url
from lowbit.api.evaluation_speed import measured_speed, weights_and_cache
from lowbit.api.evaluation_text import SERVED_CONTEXT, Text, measured_text, served_text, streamed
from lowbit.api.runs import record_file
from lowbit.api.task_results import Subject, TaskResults, lm_eval_version
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.gguf import GgufCheckpoint
from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import RecipeError
from lowbit.core.hardware import pick_device
from lowbit.core.progress import Progress, Silent
from lowbit.core.scheme import DTYPES
from lowbit.core.tokenizer import load_tokenizer
from lowbit.environments import default_root
from lowbit.evals.statistics import worst_verdict
from lowbit.evals.store import ResultStore
from lowbit.evals.tasks.catalogue import OWN, Wanted, find_leaves, parse_tasks
from lowbit.evals.tasks.harness import together
from lowbit.evals.tasks.local_data import LocalData
from lowbit.formats.reader import open_artifact


@dataclass(frozen=True)
class Evaluation:
    """What to measure, and how.

    tasks: "kl", "perplexity" and lm-eval's tasks, comma-separated, each with its own limit after a colon if it has one.
    limit: items of each task (of a group, of each of its tasks). shots: instead of a task's default. data: a folder of task
    data instead of the hub. runtime: what tasks run on: "transformers" (dequantized weights, in this process), "llama.cpp"
    (embedded), "vllm" (started for it), or the URL of a server. dtype: that transformers compute in: "auto" is the
    checkpoint's own, as in lm-eval. packed: whether transformers compute what prompts have in common once; None: in float32,
    where no score is known to change by it, but not in 16 bits, whose last digits would not be lm-eval's. dataset, windows,
    context: text for KL and perplexity, in windows next to each other (the stride is the window). held_out: of a
    calibration on that text (num_samples, seq_len, seed): windows that it did not see. speed: also measure tokens/s and
    peak memory, on a prompt of prompt_tokens. cache_context, cache_batch: for the size of the KV cache. tokenizer: a
    checkpoint, for a URL alone. rerun: also what is known from before.
    """

    tasks: str = "kl"
    limit: int | None = None
    shots: int | None = None
    data: Path | None = None
    runtime: str = "transformers"
    dtype: str = "auto"
    packed: bool | None = None
    batch_size: int | None = None
    dataset: str = "pydoc"
    windows: int = 16
    context: int = 1024
    held_out: tuple[int, int, int] | None = None
    speed: bool = False
    prompt_tokens: int = 512
    new_tokens: int = 64
    cache_context: int = 4096
    cache_batch: int = 1
    device: str = "auto"
    tokenizer: str | None = None
    rerun: bool = False


def cache_directory() -> Path:
    """Where results and base states are kept: `$XDG_CACHE_HOME/lowbit`, by default `~/.cache/lowbit`."""
    return default_root().parent


def evaluate_run(
    artifact: str | Path,
    *,
    base: str | Path | None = None,
    wanted: Evaluation | None = None,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Measure an artifact, checkpoint, .gguf file or server. Returns the run: what `lowbit compare` and `report` read.

    Whatever finished is kept under `cache` and not run again, the base's results too. Raises LowbitError subclasses.
    """
    return _Evaluating(
        str(artifact), base, wanted or Evaluation(), progress or Silent(), cache or cache_directory()
    ).run()


class _Evaluating:
    def __init__(
        self, artifact: str, base: str | Path | None, wanted: Evaluation, progress: Progress, cache: Path
    ) -> None:
        self.artifact, self.wanted, self.progress, self.cache = artifact, wanted, progress, cache
        self.is_url = is_url(artifact)
        self.runtime = artifact if self.is_url else wanted.runtime
        self.tasks: list[Wanted] = parse_tasks(wanted.tasks, wanted.limit)
        self.leaves = find_leaves(self.tasks, shots=wanted.shots)
        self.data = LocalData(wanted.data) if wanted.data and self.leaves else None
        if self.data is not None:
            for leaf in self.leaves:  # a broken line is noticed before anything runs
                self.data.splits(leaf.name)
        self.device = pick_device(wanted.device)
        self.base = None if base is None else str(base)
        check_runtime(self.runtime, artifact)
        source = wanted.tokenizer or (self.base or "" if self.is_url else artifact)
        if not source:
            raise RecipeError("a server's text needs its model's tokenizer", hint="--tokenizer MODEL, or --base MODEL")
        self.base_checkpoint = open_checkpoint(self.base) if self.base else None
        self.checkpoint = None if self.is_url else self._opened(artifact)
        self.tokenizer = load_tokenizer(open_checkpoint(wanted.tokenizer or self.base or artifact))
        self.store = ResultStore(cache / "evaluations")

    def run(self) -> dict[str, Any]:
        started = time.time()
        run: dict[str, Any] = {
            "lowbit": __version__,
            "artifact": self.artifact,
            "base": self.base,
            "runtime": self.runtime,
            "record": self._record(),
        }
        if any(task.name in OWN for task in self.tasks):
            run["text"] = self._text()
        if self.leaves:
            run["tasks"] = self._run_tasks()
            run["verdict"] = worst_verdict(
                [task["against"]["verdict"] for task in run["tasks"].values() if "against" in task]
            )
            run["lm_eval"] = lm_eval_version()
        if self.checkpoint is not None:
            run["memory"] = weights_and_cache(
                self.artifact, self.checkpoint.config, self.wanted.cache_context, self.wanted.cache_batch
            )
        if self.wanted.speed:
            run["speed"] = self._speed()
        run["seconds"] = round(time.time() - started, 1)
        run["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return run

    def _opened(self, artifact: str) -> Checkpoint:
        """Dense weights, float32 when a divergence is measured on them."""
        if artifact.endswith(".gguf") and self.base_checkpoint is not None:
            return GgufCheckpoint(Path(artifact), self.base_checkpoint.config, torch.float32)
        return open_artifact(open_checkpoint(artifact), torch.float32)

    def _record(self) -> dict[str, Any] | None:
        file = None if self.is_url else record_file(Path(self.artifact))
        return json.loads(file.read_text()) if file is not None and file.is_file() else None

    def _text(self) -> dict[str, Any]:
        wanted = self.wanted
        divergence = any(task.name == "kl" for task in self.tasks)
        base = streamed(self.base_checkpoint, self.device) if self.base_checkpoint is not None and divergence else None
        candidate = None if self.checkpoint is None else streamed(self.checkpoint, self.device)
        text = Text(wanted.dataset, wanted.windows, wanted.context, wanted.held_out)
        content = measured_text(text, self.tokenizer, candidate, base, self.cache / "states", self.progress)
        if base is not None and self.runtime != IN_PROCESS:
            with self._server(SERVED_CONTEXT + 8) as server:
                content["served"] = served_text(text, self.tokenizer, server, candidate, base, self.progress)
        return content

    def _run_tasks(self) -> dict[str, Any]:
        results = TaskResults(
            self.leaves,
            self.data,
            self.tokenizer,
            self.store,
            self.device,
            self.wanted.batch_size or (8 if self.device.type == "cpu" else 32),
            packed=self.wanted.packed,
        )
        rerun = self.wanted.rerun
        mine = results.of(self._subject(self.checkpoint, self.runtime), self.progress, "tasks", rerun=rerun)
        theirs = None
        if self.base_checkpoint is not None:
            base = self._subject(self.base_checkpoint, IN_PROCESS)
            theirs = results.of(base, self.progress, "base tasks", rerun=rerun and self.base != self.artifact)
        scores = {}
        for task in self.tasks:
            own = [leaf.name for leaf in self.leaves if leaf.group == task.name]
            if own:
                against = None if theirs is None else [theirs[name] for name in own]
                scores[task.name] = together(task.name, [mine[name] for name in own], against).to_dict()
        return scores

    def _subject(self, checkpoint: Checkpoint | None, runtime: str) -> Subject:
        return Subject(
            checkpoint, runtime, lambda: self._server(self._longest()), self._dtype(checkpoint), self._longest()
        )

    @contextmanager
    def _server(self, context: int) -> Iterator[Answering]:
        with answering(self.runtime, self.artifact, context, self.wanted.device) as server:
            if not server.endpoint.is_llama_cpp:
                server.endpoint.check_scores(self.tokenizer("Paris is in France").input_ids)
            yield server

    def _longest(self) -> int:
        """Tokens of the longest prompt that an endpoint is asked for."""
        checkpoint = self.checkpoint or self.base_checkpoint
        config = checkpoint.config if checkpoint is not None else {}
        return min(int((config.get("text_config") or config).get("max_position_embeddings") or 4096), 4096)

    def _dtype(self, checkpoint: Checkpoint | None) -> torch.dtype:
        if self.wanted.dtype != "auto":
            if self.wanted.dtype not in DTYPES:
                raise RecipeError(f"--dtype {self.wanted.dtype!r} is unknown", hint=f"auto, {', '.join(DTYPES)}")
            return DTYPES[self.wanted.dtype]
        config = checkpoint.config if checkpoint is not None else {}
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        return DTYPES.get(stored, torch.float32)

    def _speed(self) -> dict[str, Any]:
        self.progress.start("speed", 1)
        found = measured_speed(
            self.artifact,
            self.runtime,
            self.wanted.prompt_tokens,
            self.wanted.new_tokens,
            str(self.device),
            self._server,
        )
        if "error" in found:
            self.progress.warn(f"{found['runtime']} could not be timed: {found['error']}")
        self.progress.advance()
        return found
