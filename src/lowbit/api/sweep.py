"""Many methods on one model: quantized and measured with everything shared that can be, resumable, one table in the end.

Shared: the calibration text's windows, the conversion to GGUF, the base's last hidden states (one pass serves every
divergence) and the base's task results. Every artifact has the bytes that `lowbit quantize` alone would give it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lowbit.api.evaluation import Evaluation, cache_directory, evaluate_run
from lowbit.api.gguf_conversion import converted
from lowbit.api.gguf_record import card
from lowbit.api.quantize import quantize, recipe_for
from lowbit.api.run import Settings
from lowbit.api.runs import read_run, record_file, run_file, write_run
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import LowbitError, OutputError, ResumeError, VerificationError
from lowbit.core.progress import Progress, Silent
from lowbit.evals.divergence import Measurement
from lowbit.evals.verify import check
from lowbit.pipeline.writer import output_errors, write_json
from lowbit.recipe import Recipe
from lowbit.report.card import model_card

_SHARED = ".shared"


@dataclass(frozen=True)
class Sweep:
    """What to make and measure. methods: presets, methods or GGUF types. The rest is as in a recipe and an Evaluation;
    group_size goes to methods with integers in groups. options: of single methods' recipes, by method."""

    methods: tuple[str, ...]
    dataset: str = "pydoc"
    num_samples: int = 64
    seq_len: int = 512
    group_size: int | str = "auto"
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(windows=8, context=512))
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass
class Swept:
    """artifacts: finished ones, in the order of the methods. failed: method -> why."""

    artifacts: list[Path]
    failed: dict[str, str]
    seconds: dict[str, dict[str, float]]


def sweep(
    model: str | Path,
    output: Path,
    wanted: Sweep,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> Swept:
    """Quantize `model` with every method into `output`/METHOD and measure each. Run it again to continue: what is done is
    kept. A method that fails is named in the end and does not stop the others. Raises RecipeError for unknown methods."""
    return _Sweeping(
        str(model), output, wanted, settings or Settings(), progress or Silent(), cache or cache_directory()
    ).run()


class _Sweeping:
    def __init__(
        self, model: str, output: Path, wanted: Sweep, settings: Settings, progress: Progress, cache: Path
    ) -> None:
        self.model, self.output, self.wanted, self.cache = model, output, wanted, cache
        self.listener = self.progress = progress
        self.settings = replace(settings, verify=False)
        self.recipes = {method: self._recipe(method) for method in wanted.methods}
        self.checkpoint = open_checkpoint(model, revision=settings.revision)
        with output_errors(output):
            output.mkdir(parents=True, exist_ok=True)

    def run(self) -> Swept:
        done = Swept([], {}, {})
        for number, (method, recipe) in enumerate(self.recipes.items(), 1):
            self.progress = _Titled(self.listener, f"{method} ({number} of {len(self.recipes)})")
            started = time.monotonic()
            try:
                artifact = self._made(method, recipe)
                made = time.monotonic()
                self._measured(artifact, recipe)
            except LowbitError as error:
                done.failed[method] = error.message
                self.listener.warn(f"{method}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
                continue
            done.artifacts.append(artifact)
            done.seconds[method] = {"quantize": round(made - started, 1), "measure": round(time.monotonic() - made, 1)}
        shutil.rmtree(self.output / _SHARED, ignore_errors=True)
        return done

    def _recipe(self, method: str) -> Recipe:
        recipe = recipe_for(method)
        wanted = self.wanted
        grouped = recipe.kind == "int" and recipe.group_size != 0 and recipe.format != "gguf"
        return recipe.updated(
            dataset=wanted.dataset,
            num_samples=wanted.num_samples,
            seq_len=wanted.seq_len,
            group_size=wanted.group_size if grouped else None,
            options=wanted.options.get(method),
        )

    def _made(self, method: str, recipe: Recipe) -> Path:
        artifact = self.output / (f"{method}.gguf" if recipe.format == "gguf" else method)
        if artifact.exists():
            self._check_same(artifact, recipe)
            return artifact
        if recipe.format == "gguf":
            self._share_conversion(artifact)
        result = quantize(self.model, output=artifact, recipe=recipe, settings=self.settings, progress=self.progress)
        return result.path

    def _check_same(self, artifact: Path, recipe: Recipe) -> None:
        file = record_file(artifact)
        if not file.is_file():
            raise OutputError(f"{artifact} is there and is no artifact", hint="another -o")
        record = json.loads(file.read_text())
        if record["recipe"] != recipe.model_dump(mode="json"):
            raise ResumeError(
                f"{artifact} was made by another recipe", hint="the same settings as before, or another -o"
            )

    def _share_conversion(self, artifact: Path) -> None:
        """One conversion to GGUF serves every GGUF type: it is linked to where the run looks for its own."""
        if Path(self.model).suffix == ".gguf":
            return
        shared = self.output / _SHARED
        work = artifact.with_name(f".{artifact.name}.unfinished")
        with output_errors(shared):
            shared.mkdir(exist_ok=True)
            work.mkdir(exist_ok=True)
        source = converted(self.checkpoint, shared, self.progress).location
        target = work / source.name
        if not target.exists():
            with output_errors(target):
                os.link(source, target)

    def _measured(self, artifact: Path, recipe: Recipe) -> None:
        """Measure an artifact unless an earlier run did, and write what its record lacks until it is verified."""
        evaluation = self._evaluation(artifact)
        own = run_file(artifact)
        asked = {f.name: str(getattr(evaluation, f.name)) for f in fields(Evaluation)}
        before = read_run(own) if own.is_file() else None
        # a run from before an option was there was made as by its default
        usual = {f.name: str(getattr(Evaluation(), f.name)) for f in fields(Evaluation)}
        if before is not None and "asked" in before and usual | before["asked"] == asked:
            return
        # a copy in the model's own dtype is the model: its results are known
        same = recipe.method == "cast" and recipe.dtype in ("auto", self._stored_dtype())
        run = evaluate_run(
            self.model if same else artifact,
            base=self.model,
            wanted=evaluation,
            progress=self.progress,
            cache=self.cache,
        )
        record = json.loads(record_file(artifact).read_text())
        run |= {"artifact": str(artifact), "record": record, "asked": asked}
        self._verify(artifact, record, run["text"])
        write_run(run, own)

    def _evaluation(self, artifact: Path) -> Evaluation:
        wanted = self.wanted.evaluation
        tasks = wanted.tasks if "kl" in wanted.tasks.split(",") else f"{wanted.tasks},kl"
        if wanted.dataset == self.wanted.dataset and wanted.held_out is None:
            seed = self.recipes[next(iter(self.recipes))].calibration.seed
            return replace(wanted, tasks=tasks, held_out=(self.wanted.num_samples, self.wanted.seq_len, seed))
        return replace(wanted, tasks=tasks)

    def _stored_dtype(self) -> str:
        config = self.checkpoint.config
        return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")

    def _verify(self, artifact: Path, record: dict[str, Any], text: dict[str, Any]) -> None:
        """The promise that `lowbit quantize` makes, with the sweep's own measurement. Raises VerificationError, and drops
        the artifact."""
        names = {known.name for known in fields(Measurement)}
        measurement = Measurement(**{key: value for key, value in text.items() if key in names})
        errors = {path: layer["error"] for path, layer in record["layers"].items() if layer.get("error") is not None}
        try:
            check(measurement, errors)
        except VerificationError:
            _drop(artifact)
            raise
        record["verification"] = measurement.to_dict()
        write_json(record_file(artifact), record)
        with output_errors(artifact):
            if artifact.suffix == ".gguf":
                artifact.with_suffix(".card.md").write_text(card(artifact.name, record))
            else:
                (artifact / "README.md").write_text(model_card(record))


class _Titled:
    """A listener told of which method every stage is."""

    def __init__(self, listener: Progress, title: str) -> None:
        self.title, self.note, self.advance = title, listener.note, listener.advance
        self.listener = listener

    def start(self, what: str, total: int) -> None:
        self.listener.start(f"{self.title}: {what}", total)

    def warn(self, text: str) -> None:
        self.listener.warn(f"{self.title}: {text}")


def _drop(artifact: Path) -> None:
    if artifact.is_dir():
        shutil.rmtree(artifact)
        return
    stem = artifact.name.removesuffix(".gguf")
    for file in artifact.parent.glob(f"{stem}.*"):
        file.unlink()
