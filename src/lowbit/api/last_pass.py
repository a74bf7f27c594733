"""The last pass of a recipe, as artifacts of every format share it: its options, its text, what is refused before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.api.calibration import sampled_windows
from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import RecipeError
from lowbit.core.ggml_types import file_type
from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel
from lowbit.methods.kquants import CODECS
from lowbit.pipeline.codes import check_memory
from lowbit.pipeline.self_sampling import TUNING_FILE, Sampling, Shelves, kept_samples
from lowbit.pipeline.tune import TuneOptions
from lowbit.recipe import Recipe


def last_pass_options(recipe: Recipe) -> TuneOptions:
    """Options of the last pass."""
    tune = recipe.tune
    return TuneOptions(tune.steps, tune.rate, tune.batch, tune.codes, recipe.calibration.seed)


def last_pass_windows(
    checkpoint: Checkpoint, recipe: Recipe, windows: Tensor, device: torch.device, shelves: Shelves, progress: Progress
) -> Tensor:
    """The calibration's windows, and those that the model writes for this pass alone, [samples, seq_len] int64: half of its
    documents go on from passages of the calibration's text. They are kept for a continued run and for others.
    Raises CalibrationError when the model does not fit in memory for that."""
    text, own = recipe.calibration, recipe.tune.self_samples
    if not own:
        return windows
    count = len(windows) - sampled_windows(text)
    sampling = Sampling(own, text.seq_len, text.seed + 1, windows[:count] if count else None)
    return torch.cat([windows, kept_samples(sampling, TUNING_FILE, shelves, checkpoint, device, progress)])


def has_even_codes_of(file_type_name: str) -> bool:
    """Whether the tensors of a GGUF file type have codes of even steps for the most part."""
    codec = CODECS.get(file_type(file_type_name).default_type)
    return codec is not None and codec.uniform


def check_last_pass(recipe: Recipe, model: StreamedModel, *, has_codes: bool) -> None:
    """Raises RecipeError for a last pass that cannot be. has_codes: whether any layer gets codes of even steps."""
    if not recipe.tune.steps or not recipe.tune.codes:
        return
    if not has_codes:
        raise RecipeError(
            f"codes are trained on grids of even steps, and {recipe.method} has none",
            hint="an integer method (gptq, rtn, autoround) or a k-quant such as q4_k_m, or --no-tune-codes",
        )
    if recipe.transforms:
        raise RecipeError(
            f"codes are trained beside the checkpoint's weights, which {', '.join(recipe.transforms)} changes",
            hint="a method without transforms (gptq, rtn, q4_k_m), or --no-tune-codes",
        )
    check_memory(model)
