"""How large an artifact will be, and what serving it takes: the plan of the pipeline joined with the memory model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from lowbit.api.gguf_options import NO_TEXT, gguf_options
from lowbit.api.quantize import recipe_for
from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import ArchitectureError, FormatError, RecipeError
from lowbit.core.streamed_model import StreamedModel
from lowbit.formats.gguf import PlannedTensor
from lowbit.formats.reader import open_artifact
from lowbit.methods.kquants.policy import PolicyOptions, TensorInfo
from lowbit.pipeline.estimate import Estimate, Machine, Training
from lowbit.pipeline.gguf_estimate import GgufWork, estimate_gguf
from lowbit.pipeline.plan import make_plan
from lowbit.pipeline.writer import stored_bytes
from lowbit.recipe import Recipe
from lowbit.recommend.gguf_size import gguf_bytes, gguf_plan, gguf_tensors, repacked_bytes, vocabulary_bytes
from lowbit.recommend.memory import Load, MemoryParts, Place, serving_parts
from lowbit.recommend.shape import ModelShape, shape_of_config, shape_of_gguf
from lowbit.recommend.source import open_shapes

_META = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """An artifact's size, predicted. file: bytes of the weight files. weights: bytes of their tensors, which serving loads.
    recipe: what gives it. flags: what has to be said besides the method, for the model's shapes to fit. repacked: bytes of
    tensors that llama.cpp's CPU kernels hold twice."""

    file: int
    weights: int
    recipe: Recipe
    flags: str = ""
    repacked: int = 0


class Model:
    """A model whose shapes are known: a checkpoint or artifact directory, .gguf file, config.json or hub id.

    No weight is read. Raises LowbitError subclasses for what cannot be opened.
    """

    def __init__(self, name: str | Path, *, revision: str | None = None) -> None:
        self.name = str(name)
        self.gguf = GgufSource(Path(name)) if Path(name).suffix == ".gguf" and Path(name).is_file() else None
        self._revision = revision
        self._checkpoint = None if self.gguf is not None else open_shapes(name, revision=revision)
        if self.gguf is not None:
            embedding = self.gguf.tensors.get("token_embd.weight")
            self.shape: ModelShape = shape_of_gguf(self.gguf.metadata, embedding.shape[0] if embedding else 0)
        else:
            self.shape = shape_of_config(self.checkpoint.config)

    @property
    def checkpoint(self) -> Checkpoint:
        """The model under Hugging Face names; of a GGUF file it is opened when it is first asked for."""
        if self._checkpoint is None:
            self._checkpoint = open_shapes(self.name, revision=self._revision)
        return self._checkpoint

    @cached_property
    def streamed(self) -> StreamedModel:
        """The model with its parameters on the meta device."""
        return StreamedModel(open_artifact(self.checkpoint), _META, torch.bfloat16)

    @property
    def quantized(self) -> str:
        """What it is quantized to already ("awq", "q4_k_m"), "" when it is not."""
        if self.gguf is None:
            settings = self.checkpoint.config.get("quantization_config") or {}
            return str(settings.get("quant_method") or ("quantized" if settings else ""))
        kinds = [tensor.ggml_type for tensor in self.gguf.tensors.values() if len(tensor.shape) > 1]
        usual = max(set(kinds), key=kinds.count, default="F16")
        return "" if usual in ("F32", "F16", "BF16") else usual.lower()

    @property
    def weights(self) -> int:
        """Bytes of all stored tensors, as they are."""
        if self.gguf is not None:
            return sum(tensor.nbytes for tensor in self.gguf.tensors.values())
        return sum(spec.nbytes for spec in self.checkpoint.tensors.values())

    @property
    def repacked(self) -> int:
        """Bytes of tensors that llama.cpp's CPU kernels hold twice, as they are."""
        tensors = self.gguf.tensors if self.gguf is not None else {}
        return repacked_bytes({name: (tensor.ggml_type, tensor.nbytes) for name, tensor in tensors.items()})

    def size(self, method: str | Recipe) -> Size:
        """The artifact that `lowbit quantize --method` gives. Raises LowbitError where that would refuse."""
        recipe = recipe_for(method) if isinstance(method, str) else method
        if recipe.format == "gguf":
            file, weights, repacked = gguf_bytes(recipe.method, *self._gguf, _policy(recipe))
            return Size(file, weights, recipe, repacked=repacked)
        try:
            return self._stored(recipe, "")
        except RecipeError as error:
            if "does not divide" not in error.message:
                raise
            return self._stored(recipe.updated(group_size="auto"), " --group-size auto")

    def gguf_plan(self, recipe: Recipe) -> list[PlannedTensor]:
        """Every tensor of the file that a GGUF recipe gives, with its type."""
        tensors, shape, _ = self._gguf
        return gguf_plan(recipe.method, tensors, shape, _policy(recipe))

    def gguf_estimate(self, recipe: Recipe, machine: Machine, dtype: torch.dtype) -> Estimate:
        """What making that file will about take; dtype: of forward passes. Raises LowbitError for a recipe that is refused."""
        options, text, tune = gguf_options(recipe), recipe.calibration, recipe.tune
        learn, tuned = options.learn_batch * text.seq_len, tune.batch * text.seq_len
        training = Training(options.learn_steps, learn, tune.steps, tuned, tune.codes > 0)
        assert options.refine is not None  # decided by gguf_options
        windows = 0 if text.dataset == NO_TEXT else text.num_samples
        work = GgufWork(options.refine, windows, text.seq_len, self.gguf is None, training, options.fit_types)
        return estimate_gguf(self.gguf_plan(recipe), work, machine, dtype)

    @cached_property
    def _gguf(self) -> tuple[list[TensorInfo], ModelShape, int]:
        if self.gguf is not None:
            tensors = [TensorInfo(name, t.shape, t.ggml_type) for name, t in self.gguf.tensors.items()]
            return tensors, self.shape, self.gguf.header.data_start - 4096
        checkpoint = open_artifact(self.checkpoint)
        parameters = self.streamed.parameter_shapes()
        return gguf_tensors(parameters, self.shape), self.shape, vocabulary_bytes(checkpoint.companions(), self.shape)

    def _stored(self, recipe: Recipe, flags: str) -> Size:
        try:
            plan = make_plan(recipe, self.streamed)
        except AttributeError as error:  # blocks of different kinds: the plan takes all for alike
            raise ArchitectureError(
                f"blocks of {self.shape.model_type!r} differ from one another, which only GGUF formats allow for",
                hint="a GGUF method, such as q4_k_m",
            ) from error
        return Size(stored_bytes(plan.layout), plan.nbytes, recipe, flags)


def artifact_bytes(model: str | Path, method: str | Recipe) -> int:
    """Bytes of the weight files that quantizing `model` with a preset, file type or recipe will give, before any work.

    Exact for safetensors formats; of GGUF within a few kilobytes of metadata. Raises LowbitError where quantizing would.
    """
    return Model(model).size(method).file


def _policy(recipe: Recipe) -> PolicyOptions:
    """What the recipe's options change about types."""
    options = gguf_options(recipe)
    return options.policy(has_imatrix=options.refine != "none")


def serving_memory(
    model: str | Path,
    scheme: str | Recipe | None = None,
    *,
    runtime: str = "vllm",
    place: Place = "gpu",
    context: int = 4096,
    concurrency: int = 1,
    cache_dtype: str = "fp16",
    reserved: int = 0,
    devices: int = 1,
) -> MemoryParts:
    """Bytes that serving takes, by part, on all devices together.

    model: an artifact directory or .gguf file as it is; or, with `scheme` (a preset, GGUF type or recipe), what quantizing
    that model will give. concurrency: requests of `context` tokens at the same time. reserved: bytes the runtime is told to
    take for its cache (VLLM_CPU_KVCACHE_SPACE), 0: what the requests need. Raises LowbitError subclasses.
    """
    opened = Model(model)
    size = None if scheme is None else opened.size(scheme)
    weights, repacked = (opened.weights, opened.repacked) if size is None else (size.weights, size.repacked)
    if scheme is None and runtime == "llama.cpp" and opened.gguf is None:
        raise FormatError("llama.cpp serves .gguf files", hint="scheme q4_k_m, or a .gguf file")
    load = Load(context, concurrency, cache_dtype, reserved)
    return serving_parts(weights, opened.shape, load, runtime, place, devices, repacked)
