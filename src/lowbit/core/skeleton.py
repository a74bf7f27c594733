"""Modelling code of transformers with no weights: parameters on the meta device, buffers real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from lowbit.core.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_skeleton(config: Mapping[str, Any], *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a config.json, in eval mode, with every parameter on the meta device.

    Buffers (rotary frequencies and the like) are computed for real, because they are not in checkpoints.
    Raises ArchitectureError when transformers does not know the model type.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
    model_type = str(config.get("model_type", ""))
    try:
        model_config = AutoConfig.for_model(model_type, **plain)
        with init_empty_weights(include_buffers=False), _EmptyOnMeta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArchitectureError(
            f"transformers cannot build a causal language model of type {model_type!r}: {_first_line(error)}",
            hint="check config.json, or install a transformers that knows this model",
        ) from error
    model.tie_weights()
    return model.eval().requires_grad_(False)


class _EmptyOnMeta(TorchFunctionMode):
    """Memory that is asked for but not filled is not taken: modules make their weights so, and a layer's experts can be
    larger than this machine. (What they fill, norms and buffers, is small; accelerate moves the parameters among it.)"""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.empty:
            named["device"] = "meta"
        return func(*args, **named)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
