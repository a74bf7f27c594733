"""What a run's methods do for the first time, done once on random numbers while the calibration text is still being cut.

On a GPU the first call of a library opens it, and the first launch of a kernel loads it: about a second in all for GPTQ,
for which the first block would wait.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress

import torch

from lowbit.core.errors import CalibrationError
from lowbit.core.statistics import InputStatistics
from lowbit.pipeline.plan import LayerPlan, Plan

# rows and tokens: enough for the kernels that large matrices get
_ROWS, _TOKENS = 1024, 4096


def rehearsing(plan: Plan, device: torch.device, dtype: torch.dtype) -> Future[None]:
    """Rehearse in a thread; nothing else may compute on the GPU until it is done. dtype: of the inputs."""
    threads = ThreadPoolExecutor(2, thread_name_prefix="rehearsal")
    if device.type == "cuda":  # what fails there is not waited for: it fails again where it is used, and is told there
        threads.submit(_load_kernels, device)
    rehearsal = threads.submit(rehearse, plan, device, dtype)
    threads.shutdown(wait=False)
    return rehearsal


def rehearse(plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
    """Quantize a random matrix with each scheme, method and options that the plan has, of the least width that they have."""
    kinds: dict[tuple[object, ...], LayerPlan] = {}
    for layer in sorted(plan.layers.values(), key=lambda layer: layer.shape[1]):
        if layer.needs.calibration:
            kinds.setdefault((layer.scheme, layer.method.name, layer.options), layer)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # a thread has a GPU of its own
        for layer in kinds.values():
            # a GPU without room says so in the run itself, with what can be done about it
            with suppress(CalibrationError, torch.cuda.OutOfMemoryError):
                _once(layer, plan.scale_dtype(layer), device, dtype)


def _load_kernels(device: torch.device) -> None:
    from lowbit.methods import kernels

    kernels.load(device)


def _once(layer: LayerPlan, scale_dtype: torch.dtype, device: torch.device, dtype: torch.dtype) -> None:
    needs, (rows, columns) = layer.needs, layer.shape
    own = torch.Generator(device).manual_seed(0)  # the run's random numbers stay as they are
    statistics = InputStatistics(
        columns, device, gram=needs.gram, cross=needs.original, sizes=needs.inputs, sample_every=int(needs.sample)
    )
    inputs = torch.randn(_TOKENS, columns, generator=own, dtype=dtype, device=device)
    statistics.add(inputs, inputs)
    statistics.finish()
    weight = torch.randn(min(rows, _ROWS), columns, generator=own, device=device)
    quantized = layer.method.quantize(weight, statistics, layer.scheme.weights, layer.options, scale_dtype)
    quantized.tensor.dequantize(torch.float32)
