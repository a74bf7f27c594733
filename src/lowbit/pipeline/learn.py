"""Learned rounding within the pipeline: after a block has been quantized, its layers are trained together on the block's
recorded inputs, with the original block's outputs as the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from lowbit.core.streamed_model import StreamedModel
from lowbit.core.training import mixed_precision, reproducible
from lowbit.methods.learned_matrix import LearnedMatrix
from lowbit.methods.learning import Learnable, Learned, LearnOptions, Result, learn
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.job import BlockJob, BlockResult, place_weight
from lowbit.pipeline.plan import LayerPlan


def learning_layers(layers: Mapping[str, LayerPlan]) -> list[LayerPlan]:
    """Layers whose method trains them."""
    return [layer for layer in layers.values() if layer.method.learns and layer.options.steps > 0]


def learning_batch(layers: Mapping[str, LayerPlan], windows: int) -> int:
    """Windows of one gradient step."""
    return _options(learning_layers(layers)[0]).batch_of(windows)


def learn_block(job: BlockJob, result: BlockResult, targets: Activations, note: Callable[[str], None]) -> None:
    """Train the block's learning layers; the module and `result` hold the better of start and end afterwards.

    targets: the original block's outputs.
    """
    prefix = f"{job.path}."
    planned = [layer for layer in learning_layers(job.layers) if layer.path.startswith(prefix)]
    if not planned or job.arriving is None:
        return
    names = [layer.path.removeprefix(prefix) for layer in planned]
    matrices = {name: LearnedMatrix(job.matrix(name), result.tensors[prefix + name]) for name in names}
    states, options = job.arriving.states, _options(planned[0])
    learned = train_block(job.model, job.index, job.module, matrices, states, targets, options, note)
    if learned.kept_start:
        result.notes.setdefault(prefix + names[0], []).append(kept_start(learned))
        return
    for name, tensor in learned.tensors.items():
        result.tensors[prefix + name] = tensor
        place_weight(job.model, job.module, name, tensor.dequantize())


def train_block(
    model: StreamedModel,
    index: int,
    module: nn.Module,
    matrices: Mapping[str, Learnable[Result]],
    arriving: Activations,
    targets: Activations,
    options: LearnOptions,
    note: Callable[[str], None],
) -> Learned[Result]:
    """Train layers of a filled block, rows in the checkpoint's order, by name within it; nothing is put into the module.

    arriving: the states before the block. targets: the original block's outputs. `model` must have been called on as many
    windows as a gradient step takes.
    """
    device, path = model.device, model.block_path(index)
    learned_names = {f"{name}.weight" for name in matrices}
    frozen = {name: tensor.float() for name, tensor in module.named_parameters() if name not in learned_names}

    def run(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        transposed = model.architecture.transposed
        own = {f"{name}.weight": weight.T if transposed else weight for name, weight in weights.items()}
        with mixed_precision(device):
            return model.run_block(index, module, hidden, frozen | own)

    note(f"{path} learned rounding, {options.steps} steps")
    states = arriving.states
    with reproducible():
        learned = learn(
            matrices,
            run,
            lambda windows: states[windows.to(states.device)].to(device).float(),
            lambda windows: targets.states[windows.to(targets.states.device)].to(device),
            len(states),
            options,
        )
    if not learned.kept_start:
        note(f"{path} held-out loss {learned.before:.4g} -> {learned.after:.4g}")
    return learned


def kept_start(learned: Learned[Result]) -> str:
    """What is said of a block that training did not help."""
    losses = f"{learned.before:.4g} -> {learned.after:.4g}"
    return f"learned rounding did not help on held-out windows (loss {losses}): kept the start"


def _options(layer: LayerPlan) -> LearnOptions:
    given = layer.options
    return LearnOptions(given.steps, given.batch, given.reach, given.scale_reach, given.seed)
