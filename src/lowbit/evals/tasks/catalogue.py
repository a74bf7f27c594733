"""Task names -> lm-eval's task objects, with its own definitions; groups become their leaf tasks.

The common tasks' files are known by name, since reading lm-eval's whole index of fourteen thousand takes ten seconds.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.core.errors import EvaluationError, RecipeError, did_you_mean
from lowbit.evals.tasks.local_data import LocalData, Row

# name -> file below lm_eval/tasks
_COMMON = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "wikitext": "wikitext/wikitext.yaml",
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}
# shots where lm-eval leaves them open but everybody means the same
SHOTS = {"mmlu": 5}
OWN = ("kl", "perplexity")
_PRIMARY = ("acc_norm", "acc", "exact_match", "word_perplexity")


@dataclass(frozen=True)
class Wanted:
    """A task as it was asked for: its first `limit` items (of a group, of each leaf), None for all."""

    name: str
    limit: int | None = None


@dataclass(frozen=True)
class Leaf:
    """One task of lm-eval, not built yet. group: the name it was asked for by. config: lm-eval's own, resolved."""

    name: str
    group: str
    config: dict[str, Any]
    shots: int
    limit: int | None

    @property
    def primary(self) -> str:
        """The metric that goes into the table."""
        metrics = [entry["metric"] for entry in self.config["metric_list"]]
        return next((metric for metric in _PRIMARY if metric in metrics), str(metrics[0]))

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the primary metric is better."""
        entry = next(entry for entry in self.config["metric_list"] if entry["metric"] == self.primary)
        return bool(
            entry.get("higher_is_better", self.primary not in ("word_perplexity", "perplexity", "bits_per_byte"))
        )


def parse_tasks(text: str, limit: int | None) -> list[Wanted]:
    """ "mmlu:5,hellaswag,kl" -> tasks; a number after a colon is that task's own limit. Raises RecipeError."""
    wanted = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, own = part.partition(":")
        if colon and not (own.isdigit() and int(own) > 0):
            raise RecipeError(f"--tasks {part!r}: {own!r} is no number of items", hint="such as mmlu:5,hellaswag:400")
        wanted.append(Wanted(name.strip(), int(own) if colon else limit))
    if not wanted:
        raise RecipeError("no task was named", hint="--tasks hellaswag,mmlu,kl")
    names = [task.name for task in wanted]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise RecipeError(f"task {twice!r} is named twice", hint="once is enough")
    return wanted


def find_leaves(wanted: Sequence[Wanted], *, shots: int | None = None) -> list[Leaf]:
    """The leaf tasks of everything asked for, in order; `OWN` tasks are not lm-eval's and are left out.

    shots: examples before each question, instead of the task's default (MMLU 5, else lm-eval's).
    Raises RecipeError for an unknown name, EvaluationError when lm-eval is missing.
    """
    leaves: list[Leaf] = []
    for task in wanted:
        if task.name in OWN:
            continue
        for config in _configs(task.name):
            default = next((n for start, n in SHOTS.items() if task.name.startswith(start)), None)
            own = config.get("num_fewshot")
            count = shots if shots is not None and own != 0 else own if own is not None else (default or 0)
            leaves.append(Leaf(config["task"], task.name, config, count, task.limit))
    twice = {leaf.name for leaf in leaves if sum(other.name == leaf.name for other in leaves) > 1}
    if twice:
        raise RecipeError(f"task {sorted(twice)[0]!r} is part of two tasks that were named", hint="name it once")
    return leaves


@contextmanager
def libraries_silent() -> Iterator[None]:
    """lm-eval and datasets draw bars of their own on stderr, one for each of MMLU's 57 subjects."""
    with redirect_stderr(io.StringIO()):
        yield


def build(leaf: Leaf, data: LocalData | None) -> Any:
    """lm-eval's task object with its data loaded: from the folder, or from the hub. Raises EvaluationError."""
    from jinja2 import UndefinedError
    from lm_eval.api.task import ConfigurableTask

    config = dict(leaf.config)
    if data is not None:
        config |= _from_folder(config, leaf.name, data)
    try:
        with libraries_silent():
            task = ConfigurableTask(config=config)
        task.set_config(key="num_fewshot", value=leaf.shots)
        task.set_fewshot_seed(seed=1234)  # lm-eval's default
    except (KeyError, UndefinedError, IndexError) as error:
        where = f"{data.folder} holds rows for {leaf.name} without" if data else f"{leaf.name}'s data lack"
        raise EvaluationError(f"{where} {error}", hint="the columns are those of the hub's data set") from error
    except (OSError, ValueError, RuntimeError) as error:
        cause = (str(error).strip().splitlines() or ["no connection"])[0][:160]
        raise EvaluationError(
            f"the data of {leaf.name} could not be loaded: {cause}",
            hint="check the connection, or give the data with --data DIR (docs/evaluate.md); finished tasks are kept",
        ) from error
    return task


def _from_folder(config: dict[str, Any], name: str, data: LocalData) -> dict[str, Any]:
    """What replaces parts of lm-eval's definition so that it reads local rows."""
    from datasets import Dataset

    splits = data.splits(name)
    changes: dict[str, Any] = {
        key: None
        for key in ("training_split", "validation_split", "test_split", "fewshot_split")
        if config.get(key) not in splits
    }
    need = config.get("test_split") or config.get("validation_split")
    if need not in splits:
        raise EvaluationError(f"{data.folder} has no {name}.{need}.jsonl", hint="that split holds the items that count")
    if name == "hellaswag" and not any("ctx_a" in row for rows in splits.values() for row in rows):
        changes["process_docs"] = None
        splits = {split: [_short_hellaswag(row) for row in rows] for split, rows in splits.items()}
    changes["custom_dataset"] = lambda **_: {split: Dataset.from_list(rows) for split, rows in splits.items()}
    return changes


def _short_hellaswag(row: Row) -> Row:
    """A HellaSwag row whose `ctx` begins with the activity already, prepared as lm-eval prepares the hub's."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    choices = [preprocess(ending) for ending in row["endings"]]
    return {"query": preprocess(row["ctx"]), "choices": choices, "label": int(row["label"])}


def _configs(name: str) -> list[dict[str, Any]]:
    folder = _task_folder()
    if name in _COMMON and (folder / _COMMON[name]).is_file():
        return [_load(folder / _COMMON[name])]
    if name == "mmlu" or name.startswith("mmlu_"):
        files = sorted((folder / "mmlu/default").glob("mmlu_*.yaml"))
        chosen = [file for file in files if name in ("mmlu", file.stem)]
        if chosen:
            return [_load(file) for file in chosen]
    return list(_indexed(name))


def _indexed(name: str) -> Iterator[dict[str, Any]]:
    """Configurations by lm-eval's own index: of a task, of a group's tasks, of all tasks with a tag."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    if name not in index:
        known = [*OWN, *_COMMON, "mmlu", *index]
        raise RecipeError(
            f"task {name!r} is unknown{did_you_mean(name, known)}",
            hint=f"{', '.join(OWN)}, or any task of lm-eval (`lm-eval ls tasks` lists them): mmlu, hellaswag ...",
        )
    for entry in _below(name, index):
        config = _load(entry.yaml_path) | {"task": entry.name}
        if "class" in config or "metric_list" not in config:
            raise RecipeError(
                f"task {entry.name!r} is a program of its own, which lowbit does not run", hint="lm-eval does"
            )
        yield config


def _below(name: str, index: dict[str, Any]) -> Iterator[Any]:
    entry = index[name]
    kind = entry.kind.name
    if kind == "TAG":
        for other in index.values():
            if name in other.tags:
                yield from _below(other.name, index)
    elif kind == "GROUP":
        for child in (entry.cfg or {}).get("task", ()):
            if not isinstance(child, str):
                raise RecipeError(f"group {name!r} changes its tasks' definitions", hint="name its tasks one by one")
            yield from _below(child, index)
    else:
        yield entry


def _load(file: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(file, resolve_func=True, recursive=True)
    for key in ("tag", "group", "task_list", "include"):
        config.pop(key, None)
    return config


def _task_folder() -> Path:
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise EvaluationError(
            "tasks need lm-eval, which is not installed", hint="pip install 'lowbit[eval]'"
        ) from error
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return Path(lm_eval.tasks.__file__).parent
