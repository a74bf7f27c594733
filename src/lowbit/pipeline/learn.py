"""Learned rounding within the pipeline: after a block has been quantized, its layers are trained together on the block's
recorded inputs, with the original block's outputs as the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lowbit.core.training import mixed_precision, reproducible
from lowbit.methods.learning import LearnedMatrix, learn
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.job import BlockJob, BlockResult, place_weight
from lowbit.pipeline.plan import LayerPlan


def learning_layers(layers: Mapping[str, LayerPlan]) -> list[LayerPlan]:
    """Layers whose method trains them."""
    return [layer for layer in layers.values() if layer.method.learns and layer.options.steps > 0]


def learning_batch(layers: Mapping[str, LayerPlan], windows: int) -> int:
    """Windows of one gradient step: what the options say, but at most a quarter of what there is."""
    wanted: int = learning_layers(layers)[0].options.batch
    return max(1, min(wanted, windows // 4))


def learn_block(job: BlockJob, result: BlockResult, targets: Activations, note: Callable[[str], None]) -> None:
    """Train the block's learning layers; the module and `result` hold the better of start and end afterwards.

    targets: the original block's outputs.
    """
    prefix = f"{job.path}."
    planned = [layer for layer in learning_layers(job.layers) if layer.path.startswith(prefix)]
    if not planned or job.arriving is None:
        return
    states, device, options = job.arriving.states.states, job.model.device, planned[0].options
    names = [layer.path.removeprefix(prefix) for layer in planned]
    matrices = {name: LearnedMatrix(job.matrix(name), result.tensors[prefix + name]) for name in names}
    learned_names = {f"{name}.weight" for name in names}
    frozen = {name: tensor.float() for name, tensor in job.module.named_parameters() if name not in learned_names}

    def run(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        transposed = job.model.architecture.transposed
        own = {f"{name}.weight": weight.T if transposed else weight for name, weight in weights.items()}
        with mixed_precision(device):
            return job.model.run_block(job.index, job.module, hidden, frozen | own)

    note(f"{job.path} learned rounding, {options.steps} steps")
    with reproducible():
        learned = learn(
            matrices,
            run,
            lambda windows: states[windows.to(states.device)].to(device).float(),
            lambda windows: targets.states[windows.to(targets.states.device)].to(device),
            len(states),
            steps=options.steps,
            batch=learning_batch(job.layers, len(states)),
            reach=options.reach,
            scale_reach=options.scale_reach,
            seed=options.seed,
        )
    if learned.kept_start:
        losses = f"{learned.before:.4g} -> {learned.after:.4g}"
        said = f"learned rounding did not help on held-out windows (loss {losses}): kept the start"
        result.notes.setdefault(prefix + names[0], []).append(said)
        return
    note(f"{job.path} held-out loss {learned.before:.4g} -> {learned.after:.4g}")
    for name, tensor in learned.tensors.items():
        result.tensors[prefix + name] = tensor
        place_weight(job.model, job.module, name, tensor.dequantize())
