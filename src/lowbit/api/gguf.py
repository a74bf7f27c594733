"""Checkpoint + GGUF recipe -> one verified .gguf file (or a split one) that llama.cpp loads, with its record beside it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import __version__
from lowbit.api.calibration import calibration_windows, held_out_windows
from lowbit.api.gguf_conversion import converting, drop_converted
from lowbit.api.gguf_options import NO_TEXT, GgufOptions, gguf_options
from lowbit.api.gguf_record import companion_names, gguf_record, provenance, write_companions
from lowbit.api.gguf_source import opened
from lowbit.api.gguf_types import file_types, fitted_types
from lowbit.api.last_pass import check_last_pass, has_even_codes_of, last_pass_options, last_pass_windows
from lowbit.api.run import Result, Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.gguf import GgufCheckpoint
from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import OutputError, RecipeError
from lowbit.core.hardware import calibration_dtype, free_memory_on, peak_memory_mib, pick_device, reset_peak_memory
from lowbit.core.progress import Progress
from lowbit.core.scheme import DTYPES
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.text import windows_digest
from lowbit.evals.divergence import Measurement, measure
from lowbit.evals.verify import check
from lowbit.formats.gguf import PlannedTensor, copied_pairs, lay_out
from lowbit.formats.gguf_imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from lowbit.methods.kquants.codec import CODECS
from lowbit.methods.kquants.second_order import SecondOrderOptions
from lowbit.pipeline.gguf_encode import GgufJob, encode_tensors
from lowbit.pipeline.gguf_names import LinearTensor, linear_tensors
from lowbit.pipeline.gguf_second_order import SecondOrderRun
from lowbit.pipeline.gguf_statistics import importance_matrix
from lowbit.pipeline.gguf_tuned import tune_gguf
from lowbit.pipeline.gguf_writer import GgufWriter
from lowbit.pipeline.journal import Journal
from lowbit.pipeline.run import Streams
from lowbit.pipeline.writer import output_errors, sha256_of, write_json
from lowbit.recipe import Recipe

_IMATRIX, _TYPES = "imatrix.gguf", "types.json"


def quantize_gguf(model: str | Path, *, output: Path, recipe: Recipe, settings: Settings, progress: Progress) -> Result:
    """Quantize a checkpoint, or an unquantized GGUF file, into the file `output`.

    Beside it go NAME.lowbit.json (the record), NAME.card.md and NAME.Modelfile, and with an importance matrix made here
    NAME.imatrix.gguf. Run again after a crash it continues. Raises LowbitError subclasses; nothing half-written is left.
    """
    return _GgufRun(model, output, recipe, settings, progress).run()


class _GgufRun:
    def __init__(self, model: str | Path, output: Path, recipe: Recipe, settings: Settings, progress: Progress) -> None:
        if output.suffix != ".gguf":
            raise OutputError(f"a GGUF file is named *.gguf, not {output.name}", hint=f"-o {output}.gguf")
        self.name, self.output, self.recipe = str(model), output, recipe
        self.settings, self.progress = settings, progress
        self.options: GgufOptions = gguf_options(recipe)
        if recipe.tune.steps and self.options.refine != "hessian":
            raise RecipeError(
                "the last pass over scales follows second-order rounding", hint="--refine hessian, or --tune 0"
            )
        self.device = pick_device(settings.device)
        self.from_gguf = Path(model).suffix == ".gguf"
        # a GGUF input that is only to be encoded need not be of a family that transformers knows
        self._checkpoint = None if self.from_gguf else open_checkpoint(model, revision=settings.revision)
        if recipe.tune.codes:  # without it a file need not be of a family that transformers knows
            check_last_pass(recipe, self._model(), has_codes=has_even_codes_of(recipe.method))
        taken = [output.with_name(name) for name in companion_names(output.name) if output.with_name(name).exists()]
        if taken:
            raise OutputError(f"{taken[0]} exists already", hint="choose another -o, or remove it first")

    def run(self) -> Result:
        started = time.monotonic()
        reset_peak_memory(self.device)
        work = self._work_directory()
        with self._source(work) as source:
            return self._run(source, work, started)

    def _source(self, work: Path) -> AbstractContextManager[GgufSource]:
        if self.from_gguf:
            return nullcontext(opened(Path(self.name), allow_requantize=self.options.allow_requantize))
        return converting(self.checkpoint, work, self.progress)

    def _run(self, source: GgufSource, work: Path, started: float) -> Result:
        windows = self._calibration_windows(work)
        digest = None if windows is None else windows_digest(windows)
        journal = Journal(work, self._inputs(source, digest))
        model = self._model() if windows is not None else None
        linears = linear_tensors(model, source) if model is not None else {}
        matrix = self._importance(work, model, linears, windows)
        types = self._types(source, model, windows, work)
        keys = provenance(self.recipe, self.name, self._identity(source), digest, matrix, len(linears), windows)
        files = lay_out(
            self.output.name,
            copied_pairs(source.location, source.header, list(keys)) | keys,
            [PlannedTensor(name, source.tensors[name].shape, kind) for name, kind in types.items()],
            alignment=source.header.alignment,
            max_shard=self.options.max_shard_size,
        )
        writer = GgufWriter(work, files)
        job = GgufJob(source, types, writer, journal, self.device, self.progress)
        resumed = self._encode(job, matrix, model, linears, windows, work)
        tuning = self._tune(job, model, linears, windows, work)
        checksums = writer.finish()
        quantized = time.monotonic()
        measurement = self._verify(work / files[0].name, job) if self.settings.verify else None
        record = gguf_record(self.recipe, self.name, self._identity(source), job, checksums, digest, measurement)
        if tuning is not None:
            record["tuning"] = tuning
        record["versions"] = {"torch": torch.__version__, "compute": self._compute()}
        cost = {
            "seconds": round(quantized - started, 2),
            "verification_seconds": round(time.monotonic() - quantized, 2),
            "resumed_blocks": resumed,
            "peak_memory_mib": {name: round(value, 1) for name, value in peak_memory_mib(self.device).items()},
            "threads": torch.get_num_threads(),
        }
        self._publish(work, record, cost, [file.name for file in files])
        return Result(self.output.with_name(files[0].name), record, cost)

    @property
    def checkpoint(self) -> Checkpoint:
        """The model under Hugging Face names."""
        if self._checkpoint is None:
            self._checkpoint = open_checkpoint(self.name, revision=self.settings.revision)
        return self._checkpoint

    def _work_directory(self) -> Path:
        work = self.output.with_name(f".{self.output.name}.unfinished")
        with output_errors(work):
            if self.settings.restart and work.exists():
                shutil.rmtree(work)
            work.mkdir(parents=True, exist_ok=True)
        return work

    def _encode(
        self,
        job: GgufJob,
        matrix: ImportanceMatrix | None,
        model: StreamedModel | None,
        linears: Mapping[str, LinearTensor],
        windows: Tensor | None,
        work: Path,
    ) -> int:
        """Write all tensors; returns how many blocks of second-order rounding an earlier run had done."""
        if self.options.refine != "hessian" or model is None or windows is None:
            encode_tensors(job, list(job.types), matrix.tensors if matrix else None)
            return 0
        rounded = {path: linear for path, linear in linears.items() if job.types[linear.tensor] in CODECS}
        tensors = {linear.tensor for linear in rounded.values()}
        # the head is rounded last; where it is the embedding too, the blocks are fed by a plain one until then
        head = "output.weight" if "output.weight" in job.types else "token_embd.weight"
        rounds_head = job.types.get(head) in CODECS and job.source.tensors[head].ggml_type not in CODECS
        others = [name for name in job.types if name not in tensors and (name != head or not rounds_head)]
        # the blocks are fed by the embedding; all else can wait for a conversion that is still running
        embedding = [name for name in job.types if name == "token_embd.weight"]
        encode_tensors(job, embedding, provisional=[head] if rounds_head else [])
        left = [n for n, kind in job.types.items() if n not in tensors and kind in CODECS and n.startswith("blk.")]
        if left:
            self.progress.warn(
                f"{len(left)} tensors are no single linear layer and were rounded plainly: {left[0]} ..."
            )
        widest = max(job.source.tensors[name].shape[-1] for name in tensors)
        if windows.numel() < 4 * widest:
            self.progress.warn(
                f"{windows.numel()} tokens of calibration are few for layers of {widest} inputs: rounding may fit them "
                f"instead of the language; give {4 * widest} or more (--num-samples, --seq-len), or --refine none"
            )
        chosen = self.options
        options = SecondOrderOptions(damping=chosen.damping, sweeps=chosen.sweeps, asymmetric=chosen.asymmetric)
        rounding = SecondOrderRun(
            job, model, rounded, self._streams(work), options, head if rounds_head else None, chosen.learning
        )
        resumed = rounding.quantize(windows)
        encode_tensors(job, [name for name in others if name not in embedding])
        return resumed

    def _tune(
        self,
        job: GgufJob,
        model: StreamedModel | None,
        linears: Mapping[str, LinearTensor],
        windows: Tensor | None,
        work: Path,
    ) -> dict[str, Any] | None:
        if not self.recipe.tune.steps or model is None or windows is None:
            return None
        rounded = {path: linear for path, linear in linears.items() if job.types[linear.tensor] in CODECS}
        shelves = self.settings.shelves(work)
        text = last_pass_windows(self.checkpoint, self.recipe, windows, self.device, shelves, self.progress)
        options, streams = last_pass_options(self.recipe), self._streams(work)
        return tune_gguf(job, model, rounded, text, options, streams, self.progress)

    def _types(
        self, source: GgufSource, model: StreamedModel | None, windows: Tensor | None, work: Path
    ) -> dict[str, str]:
        policy = self.options.policy(has_imatrix=self.options.refine != "none")
        types = file_types(source, self.recipe.method, policy)
        if not self.options.fit_types or model is None or windows is None:
            return types
        return fitted_types(model, source, windows, types, work / _TYPES, self.progress)

    def _importance(
        self,
        work: Path,
        model: StreamedModel | None,
        linears: Mapping[str, LinearTensor],
        windows: Tensor | None,
    ) -> ImportanceMatrix | None:
        if self.options.refine != "imatrix":
            return None
        if self.options.imatrix:
            return read_imatrix(Path(self.options.imatrix))
        file = work / _IMATRIX
        if not file.is_file():
            assert model is not None
            assert windows is not None
            dataset = self.recipe.calibration.dataset
            made = importance_matrix(model, linears, windows, dataset, self._streams(work), self.progress)
            with output_errors(file):
                write_imatrix(file, made)
        return read_imatrix(file)

    def _model(self) -> StreamedModel:
        stored = DTYPES.get(str(self.checkpoint.config.get("dtype")), torch.bfloat16)
        return StreamedModel(self.checkpoint, self.device, calibration_dtype(self.device, stored))

    def _calibration_windows(self, work: Path) -> Tensor | None:
        wanted = self.recipe.calibration
        if self.options.refine == "none" or self.options.imatrix or wanted.dataset == NO_TEXT:
            return None
        return calibration_windows(self.checkpoint, wanted, self.device, self.settings.shelves(work), self.progress)

    def _inputs(self, source: GgufSource, digest: str | None) -> dict[str, Any]:
        """Everything that decides the bytes of the file."""
        imatrix = self.options.imatrix
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "checkpoint": self._identity(source),
            "calibration": digest,
            "imatrix": sha256_of(Path(imatrix)) if imatrix else None,
            "lowbit": __version__,
            "torch": torch.__version__,
            "compute": self._compute(),
        }

    def _identity(self, source: GgufSource) -> str:
        return source.identity() if self.from_gguf else self.checkpoint.identity()

    def _compute(self) -> str:
        return f"{self.device.type} {calibration_dtype(self.device, torch.float16)}"

    def _streams(self, work: Path) -> Streams:
        tokens = 16384 if self.device.type == "cuda" else 4096
        return Streams(tokens, self.settings.max_memory or free_memory_on(self.device) // 3, work)

    def _verify(self, file: Path, job: GgufJob) -> Measurement:
        """Measure the finished file against its base on text that calibration did not see."""
        candidate = GgufCheckpoint(file, self.checkpoint.config, torch.float32)
        windows = held_out_windows(self.checkpoint, self.recipe.calibration)
        measurement = measure(
            StreamedModel(candidate, self.device, torch.float32),
            windows,
            self.progress,
            base=StreamedModel(self.checkpoint, self.device, torch.float32),
        )
        check(measurement, job.errors(), self.settings.max_kl, self.settings.min_recovery)
        return measurement

    def _publish(self, work: Path, record: dict[str, Any], cost: dict[str, Any], names: list[str]) -> None:
        """Give everything its final name; the model file last, so that it is only there with all that belongs to it."""
        place = self.output.parent
        write_companions(work, self.output.name, names[0], record)
        stem = self.output.name.removesuffix(".gguf")
        write_json(work / f"{stem}.lowbit.json", record | {"run": cost})
        with output_errors(place):
            if (work / _IMATRIX).is_file():
                os.replace(work / _IMATRIX, place / f"{stem}.imatrix.gguf")
            for name in [f"{stem}.lowbit.json", f"{stem}.card.md", f"{stem}.Modelfile", *reversed(names)]:
                os.replace(work / name, place / name)
            drop_converted(work)
            shutil.rmtree(work)
