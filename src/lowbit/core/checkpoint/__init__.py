"""Checkpoints: where weights are read from, lazily, tensor by tensor."""

from lowbit.core.checkpoint.open import open_checkpoint

__all__ = ["open_checkpoint"]
