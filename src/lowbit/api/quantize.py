"""Checkpoint + recipe -> verified artifact. Joins the pipeline, the formats and the evaluation."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import __version__
from lowbit.api.calibration import calibration_windows, held_out_windows, sampled_windows
from lowbit.api.effort import resolved
from lowbit.api.last_pass import check_last_pass, last_pass_options, last_pass_windows
from lowbit.api.record import record_of
from lowbit.api.run import Result, Settings, run_cost
from lowbit.api.work_directory import check_place, work_directory
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.prefetch import Prefetching
from lowbit.core.contracts import Checkpoint
from lowbit.core.distributed import (
    GGUF_MADE,
    LEARNED,
    World,
    check_windows,
    joined,
    own_device,
    refuse_several_processes,
)
from lowbit.core.hardware import calibration_dtype, free_memory_on, peak_memory_mib, pick_device, reset_peak_memory
from lowbit.core.progress import Progress, Silent
from lowbit.core.scheme import DTYPES
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.text import windows_digest
from lowbit.core.tokenizer import load_tokenizer
from lowbit.evals.divergence import Measurement, measure
from lowbit.evals.verify import check
from lowbit.formats.reader import open_artifact
from lowbit.methods import METHODS
from lowbit.pipeline.estimate import Estimate, estimate, this_machine
from lowbit.pipeline.journal import Journal
from lowbit.pipeline.learn import learning_layers
from lowbit.pipeline.output import Output, WrittenOutput
from lowbit.pipeline.plan import Plan, make_plan
from lowbit.pipeline.rehearsal import rehearsing
from lowbit.pipeline.run import RunReport, Streams, run
from lowbit.pipeline.self_sampling import remove_samples
from lowbit.pipeline.tuned import has_even_codes, remove_tuning, tune_artifact
from lowbit.pipeline.writer import ShardedWriter, output_errors, write_json
from lowbit.recipe import Recipe, preset, preset_names
from lowbit.report.card import model_card


def quantize(
    model: str | Path,
    *,
    output: str | Path,
    recipe: Recipe | None = None,
    method: str = "gptq",
    effort: str = "balanced",
    tune_codes: bool | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Result:
    """Quantize a checkpoint into `output`.

    recipe: a whole recipe; else the preset or method `method`. effort: "fast", "balanced" or "best" (lowbit.api.effort),
    applied to it. tune_codes: train codes in the last pass; None: as the effort has it. changes: recipe fields by name
    (bits=4, group_size=64, dataset="pydoc", num_samples=64, tune_steps=64, ...). Raises LowbitError subclasses; nothing
    half-written is left at `output`.

    Under torchrun every process calls this; they share the work, the leader writes and verifies, and only its result is
    complete (the others' has neither checksums nor verification, and is given before the artifact is finished).
    """
    settings, progress = settings or Settings(), progress or Silent()
    steps = changes.pop("tune_steps", None)
    recipe = (recipe or recipe_for(method)).updated(**changes)
    place = settings.device, settings.revision
    recipe = resolved(recipe, effort, model, *place, tune_steps=steps, tune_codes=tune_codes)
    if recipe.format == "gguf":
        refuse_several_processes(GGUF_MADE)
        from lowbit.api.gguf import quantize_gguf

        return quantize_gguf(model, output=Path(output), recipe=recipe, settings=settings, progress=progress)
    return _Run(open_checkpoint(model, revision=settings.revision), str(model), recipe, settings, progress).to(
        Path(output)
    )


def plan(model: str | Path, *, recipe: Recipe, settings: Settings | None = None) -> tuple[Plan, Estimate]:
    """What quantizing would do: every layer's numbers and every tensor's size, without reading a weight; and about how
    much memory and time it would take here."""
    settings = settings or Settings()
    run = _Run(open_checkpoint(model, revision=settings.revision), str(model), recipe, settings, Silent())
    machine = this_machine(run.model.device, run.model.dtype)
    expected = estimate(run.plan, run.model, recipe, machine)
    return run.plan, expected


def recipe_for(method: str) -> Recipe:
    """The preset of that name, a GGUF file type, or a plain recipe with that method. Raises RecipeError."""
    from lowbit.api.gguf_options import gguf_recipe, is_gguf_method

    if method in preset_names():
        return preset(method)
    if is_gguf_method(method):
        return gguf_recipe(method)
    return Recipe(method=method) if method in METHODS.names() else preset(method)


class _Run:
    """One quantization, from an opened checkpoint to a published directory."""

    def __init__(
        self, checkpoint: Checkpoint, name: str, recipe: Recipe, settings: Settings, progress: Progress
    ) -> None:
        self.checkpoint, self.name, self.recipe = checkpoint, name, recipe
        self.settings, self.progress = settings, progress
        self.device = own_device(pick_device(settings.device))
        self.source = open_artifact(checkpoint)
        if self.device.type == "cuda":
            self.source = Prefetching(self.source, self.device)
        stored = DTYPES.get(str(checkpoint.config.get("dtype")), torch.bfloat16)
        self.model = StreamedModel(self.source, self.device, calibration_dtype(self.device, stored))
        if not self.model.known:
            progress.warn(
                f"model type {checkpoint.config.get('model_type')!r} is not in the table of architectures; "
                f"its blocks were found at {self.model.architecture.blocks}"
            )
        self.plan = make_plan(recipe, self.model)
        check_last_pass(recipe, self.model, has_codes=any(has_even_codes(layer) for layer in self.plan.layers.values()))
        if recipe.tune.steps or learning_layers(self.plan.layers):
            refuse_several_processes(LEARNED)

    def to(self, output: Path) -> Result:
        reset_peak_memory(self.device)
        started = time.monotonic()
        work = work_directory(output)
        rehearsal = self._rehearsal()
        with joined(self.device) as world:
            world.from_leader(lambda: check_place(output, work, restart=self.settings.restart))
            if self.plan.needs_calibration:
                self.model.announce()
            windows = world.from_leader(lambda: self._calibration_windows(work))
            if rehearsal is not None:
                rehearsal.result()
            if windows is not None:
                check_windows(len(windows), world.size)
            digest = None if windows is None else windows_digest(windows)
            result = self._output(work, digest, world)
            report = run(
                self.plan,
                self.model,
                windows if self.plan.needs_calibration else None,
                result,
                self._streams(work),
                self.progress if world.leads else Silent(),
                sequential=self.recipe.sequential,
                world=world,
            )
            # taking leave of other processes takes a moment, which no file waits for
            if isinstance(result, WrittenOutput):
                tuning = self._tune(windows, result.writer, work)
                checksums = result.writer.finish()
            quantized, peak = time.monotonic(), peak_memory_mib(self.device)
        if not isinstance(result, WrittenOutput):
            return self._follower(output, report, digest, quantized - started)
        measurement = self._verify(work, report) if self.settings.verify else None
        record = self._record(report, checksums, digest, measurement) | ({"tuning": tuning} if tuning else {})
        write_json(work / "lowbit.json", record)
        cost = run_cost(report.resumed_blocks, quantized - started, time.monotonic() - quantized, peak)
        write_json(work / "lowbit-run.json", cost)
        with output_errors(work):
            (work / "README.md").write_text(model_card(record))
            result.journal.remove()
            remove_tuning(work)
            remove_samples(work)
            os.rename(work, output)
        return Result(output, record, cost)

    def _output(self, work: Path, digest: str | None, world: World) -> Output:
        """The leader's files and journal; for the others what the journal says."""
        result: Output | None = None
        if world.leads:
            with output_errors(work):
                work.mkdir(parents=True, exist_ok=True)
            journal = Journal(work, self._inputs(digest, world))
            result = WrittenOutput(ShardedWriter(work, self.plan.layout), journal)
            self._write_companions(work)
        blocks = world.from_leader(lambda: {} if result is None else result.blocks)
        return result or Output(work, blocks)

    def _follower(self, output: Path, report: RunReport, digest: str | None, seconds: float) -> Result:
        cost = run_cost(report.resumed_blocks, seconds, 0.0, peak_memory_mib(self.device))
        return Result(output, self._record(report, {}, digest, None), cost)

    def _rehearsal(self) -> Future[None] | None:
        """A GPU gets warm while text is cut into tokens; where the model writes some it does so by itself."""
        idle = self.device.type == "cuda" and self.plan.needs_calibration
        if not idle or sampled_windows(self.recipe.calibration):
            return None
        return rehearsing(self.plan, self.device, self.model.dtype)

    def _calibration_windows(self, work: Path) -> Tensor | None:
        if not self.plan.needs_calibration and not self.recipe.tune.steps:
            return None
        shelves = self.settings.shelves(work)
        return calibration_windows(self.source, self.recipe.calibration, self.device, shelves, self.progress)

    def _tune(self, windows: Tensor | None, writer: ShardedWriter, work: Path) -> dict[str, Any] | None:
        if not self.recipe.tune.steps or windows is None or self.plan.format is None:
            return None
        shelves = self.settings.shelves(work)
        text = last_pass_windows(self.source, self.recipe, windows, self.device, shelves, self.progress)
        options, streams = last_pass_options(self.recipe), self._streams(work)
        return tune_artifact(self.plan, self.model, text, writer, options, streams, self.progress)

    def _inputs(self, digest: str | None, world: World) -> dict[str, Any]:
        """Everything that decides the bytes of the artifact; shared sums are rounded in another order."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "checkpoint": self.checkpoint.identity(),
            "calibration": digest,
            "lowbit": __version__,
            "torch": torch.__version__,
            "compute": f"{self.device.type} {self.model.dtype}",
            **({"processes": world.size} if world.size > 1 else {}),
        }

    def _streams(self, work: Path) -> Streams:
        tokens = 16384 if self.device.type == "cuda" else 4096
        return Streams(tokens, self.settings.max_memory or free_memory_on(self.device) // 3, work)

    def _write_companions(self, work: Path) -> None:
        config = {key: value for key, value in self.source.config.items() if key != "quantization_config"}
        config.pop("torch_dtype", None)
        config["dtype"] = str(self.plan.dtype).removeprefix("torch.")
        if self.plan.format is not None:
            schemes = {path: layer.scheme for path, layer in self.plan.layers.items()}
            cache = {"kv_cache": "fp8"} if self.plan.kv_cache else {}
            quantization = self.plan.format.quantization_config(schemes, self.plan.skipped, **cache)
            config["quantization_config"] = quantization
            for name, content in self.plan.format.files(quantization).items():
                write_json(work / name, content)
        write_json(work / "config.json", config)
        with output_errors(work):
            companions = self.checkpoint.companions()
            for name, file in companions.items():
                shutil.copyfile(file, work / name)
            if not companions and self.checkpoint.location.suffix == ".gguf":
                load_tokenizer(self.checkpoint).save_pretrained(work)

    def _verify(self, work: Path, report: RunReport) -> Measurement:
        windows = held_out_windows(self.checkpoint, self.recipe.calibration)
        candidate = open_artifact(open_checkpoint(work), torch.float32)
        measurement = measure(
            StreamedModel(candidate, self.device, torch.float32),
            windows,
            self.progress,
            base=StreamedModel(self.source, self.device, torch.float32),
        )
        check(measurement, report.errors, self.settings.max_kl, self.settings.min_recovery)
        return measurement

    def _record(
        self, report: RunReport, checksums: Mapping[str, str], digest: str | None, measurement: Measurement | None
    ) -> dict[str, Any]:
        base = {
            "name": self.name,
            "identity": self.checkpoint.identity(),
            "model_type": self.source.config.get("model_type"),
            "bytes": sum(spec.nbytes for spec in self.checkpoint.tensors.values()),
        }
        return record_of(
            self.plan,
            self.model,
            base,
            self.recipe,
            report,
            checksums=checksums,
            calibration=digest,
            measurement=measurement,
        )
