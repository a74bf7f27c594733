"""A last pass over the whole artifact: scales and norms are trained until its next-token distribution is the base's.

What is trained is small (one factor for each scale, one for each weight of a block's norms), so a few dozen steps on little
text do not overfit, and what one block gets wrong another can make up for, which no layer-wise method sees. The loss is
the KL divergence of the base's distribution from the artifact's, as verification measures it; end-to-end training of
quantization scales is EfficientQAT's second phase (Chen et al. 2024), there on the text itself.

Codes stay, unless they are trained too (codes.py). Memory is bounded as in the rest of the pipeline (student.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.core.compiling import can_compile
from lowbit.core.progress import Progress
from lowbit.core.recording import MANY_CALLS
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.training import reproducible
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.codes import Codes
from lowbit.pipeline.factors import Factors
from lowbit.pipeline.student import Student

_WARM_UP = 5
# compiling takes as long as a hundred steps or two
_COMPILED_FROM = 200
# steps between two looks at the loss on a GPU: each waits for it
_SAY_EVERY = 8
# steps between two saves of the training state; with codes it is 12 bytes a weight
_SAVE_EVERY, _SAVE_CODES_EVERY = 16, 128
# how much of what was learned is tried on held-out windows: the less there is to gain, the sooner training goes too far
_SHARES = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class TuneOptions:
    """steps: gradient steps. rate: the largest step, as a share of a scale. batch: windows a step, and windows held out. codes:
    the largest step of a weight along its grid, in units of the grid's own steps; 0 leaves codes as they are."""

    steps: int = 64
    rate: float = 3e-3
    batch: int = 8
    codes: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """KL on held-out windows before and after. moved: the share of codes that changed; None where they were not trained."""

    before: float
    after: float
    moved: float | None = None

    def record(self) -> dict[str, float]:
        """For lowbit.json."""
        said = {"before": self.before, "after": self.after}
        return said if self.moved is None else {**said, "moved_codes": self.moved}


def tune(
    base: StreamedModel,
    artifact: StreamedModel,
    factors: Factors,
    teacher: Activations,
    windows: Tensor,
    options: TuneOptions,
    progress: Progress,
    codes: Codes | None = None,
) -> Tuned:
    """Train `factors` in place, and `codes`; keep that share of what factors learned that serves held-out windows best. When
    those did not gain, factors are all zero afterwards and codes give their start.

    artifact: its blocks read as dense weights. teacher: the base's states after its last block for all windows.
    windows: [samples, tokens] int64.
    """
    batch = max(1, min(options.batch, len(windows) // 4))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed))
    held_out, training = order[:batch], order[batch:]
    progress.start("tune", options.steps)
    held = windows[held_out], teacher.states[held_out.to(teacher.states.device)]
    # the states are in float32 in training, and a layer norm wants its weights to be so too
    with reproducible(), base.outside(torch.float32), artifact.outside(torch.float32):
        student = Student(base, artifact, factors)
        reached = factors.values.clone()  # by an earlier run
        factors.values.zero_()
        before = student.loss(*held)
        factors.values.copy_(reached)
        if codes is not None:
            student = Student(base, artifact, factors, codes)
        # a continued run does as the whole one, however few steps are left: compiled sums are rounded otherwise
        if options.steps >= MANY_CALLS and student.can_record(windows[:1]):
            worth_it = codes is not None and options.steps >= _COMPILED_FROM
            compiling = worth_it and can_compile(base.device)
            if worth_it and not compiling:
                progress.warn(
                    "torch.compile does not work here (it needs Triton and a C compiler): training takes longer"
                )
            student.record(compiling=compiling)
        windows = windows.to(base.device)
        say_every = _SAY_EVERY if base.device.type == "cuda" else 1
        for step in range(factors.step, options.steps):
            chosen, share = _batch(training, batch, step, options.seed), _schedule(step, options.steps)
            if codes is not None:
                codes.begin(step + 1, options.codes * share)
            found = student.gradients(windows[chosen.to(base.device)], teacher.states[chosen.to(teacher.states.device)])
            factors.descend(options.rate * share)
            if step % say_every == 0:
                progress.note(f"KL {found.item():.4f}")
            progress.advance()
            if factors.step % (_SAVE_EVERY if codes is None else _SAVE_CODES_EVERY) == 0:
                factors.save({} if codes is None else codes.state())
        after = _keep_best_share(factors.values, lambda: student.loss(*held))
    if not after < before:
        factors.values.zero_()
        what = "scales" if codes is None else "codes and scales"
        progress.warn(
            f"tuning {what} did not help on held-out windows (KL {before:.4g} -> {after:.4g}): kept the start"
        )
    if codes is not None:
        codes.kept = after < before
    return Tuned(before, min(before, after), None if codes is None else codes.moved())


def _keep_best_share(trained: Tensor, loss: Callable[[], float]) -> float:
    """Multiply `trained` by the share with the least loss, which is returned."""
    whole, found = trained.clone(), {}
    for share in _SHARES:
        trained.copy_(whole).mul_(share)
        found[share] = loss()
    best = min(found, key=found.__getitem__)
    trained.copy_(whole).mul_(best)
    return found[best]


def last_states(base: StreamedModel, windows: Tensor, states: Activations, progress: Progress) -> None:
    """Fill `states` with the base's hidden states after its last block."""
    progress.start("base", len(base.blocks))
    with torch.no_grad():
        with base.outside(head=False):
            for where in states.batches():
                states.put(where, base.embed(windows[where]))
        for index in range(len(base.blocks)):
            with base.block(index) as block:
                for where in states.batches():
                    states.put(where, base.run_block(index, block, states.get(where, base.device)))
            progress.advance()


def _batch(training: Tensor, size: int, step: int, seed: int) -> Tensor:
    """Windows of a step: every epoch is a shuffle of its own, so that a continued run sees the same ones."""
    steps = max(1, len(training) // size)
    generator = torch.Generator().manual_seed(seed + 1 + step // steps)
    start = step % steps * size
    return training[torch.randperm(len(training), generator=generator)[start : start + size]]


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
