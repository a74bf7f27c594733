"""Memory of serving, part by part: weights, cache of keys and values, working space, the runtime itself.

Sources of the layouts: vLLM (docs, "Conserving memory"; v1/worker/gpu_worker.py, platforms/cpu.py), llama.cpp
(src/llama-kv-cache.cpp, src/llama-context.cpp). What no layout says is measured, see runtimes.yaml.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from lowbit.core.errors import RecipeError, did_you_mean
from lowbit.recommend.shape import ModelShape

Place = Literal["gpu", "cpu"]
PARTS = ("weights", "cache", "activations", "overhead")
# bytes of one cached number; q8_0 and q4_0 have a 16-bit scale for every 32
CACHE_DTYPES = {"fp16": 2.0, "bf16": 2.0, "f16": 2.0, "fp8": 1.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


@dataclass(frozen=True)
class MemoryParts:
    """Bytes while serving, of all devices together. reserved: what the runtime takes for its cache at the start, when that
    is more than `cache`, which is what the requests need. repacked: weights that are in memory a second time, in the order
    that llama.cpp's CPU kernels want; the first copy is the mapped file, which the system drops when memory is short."""

    weights: int
    cache: int
    activations: int
    overhead: int
    reserved: int = 0
    repacked: int = 0

    @property
    def total(self) -> int:
        """What is resident at the peak: all parts; a reserved cache counts whole."""
        return self.needed + self.repacked

    @property
    def needed(self) -> int:
        """What has to be there: without the copies that the system can drop."""
        return self.weights + max(self.cache, self.reserved) + self.activations + self.overhead

    def to_dict(self) -> dict[str, int]:
        """Parts and their sums, bytes."""
        return {**asdict(self), "needed": self.needed, "total": self.total}


@dataclass(frozen=True)
class Load:
    """What is asked of a server: `concurrency` requests of `context` tokens each, at the same time.

    cache_dtype: see CACHE_DTYPES. reserved: bytes that the runtime is told to take for its cache at the start
    (VLLM_CPU_KVCACHE_SPACE), 0: as much as is needed.
    """

    context: int = 4096
    concurrency: int = 1
    cache_dtype: str = "fp16"
    reserved: int = 0


def runtime_constants(runtime: str, place: Place) -> dict[str, Any]:
    """The measured constants of a runtime on a place. Raises RecipeError for one that is not known or cannot run there."""
    table = _table()
    if runtime not in table:
        raise RecipeError(
            f"runtime {runtime!r} is unknown{did_you_mean(runtime, table)}", hint=f"one of {', '.join(table)}"
        )
    if place not in table[runtime]:
        raise RecipeError(
            f"{runtime} does not run on a {place.upper()}", hint=f"it runs on: {', '.join(table[runtime])}"
        )
    constants: dict[str, Any] = table[runtime][place]
    return constants


def runtimes() -> list[str]:
    """The runtimes that the memory model knows."""
    return list(_table())


@cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    text = resources.files("lowbit.recommend").joinpath("runtimes.yaml").read_text()
    content: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(text)
    return content


def cache_bytes(shape: ModelShape, load: Load, runtime: str) -> int:
    """Keys and values of all requests, rounded as the runtime allots them."""
    if load.cache_dtype not in CACHE_DTYPES:
        raise RecipeError(f"cache dtype {load.cache_dtype!r} is unknown{did_you_mean(load.cache_dtype, CACHE_DTYPES)}",
                          hint=f"one of {', '.join(CACHE_DTYPES)}")  # fmt: skip
    numbers = sum(layer.elements * _cached_tokens(layer.window, load, runtime) for layer in shape.cache)
    return int(numbers * CACHE_DTYPES[load.cache_dtype])


def _cached_tokens(window: int | None, load: Load, runtime: str) -> int:
    if runtime == "llama.cpp":  # one buffer for all requests, in steps of 256 cells; windows keep a batch besides
        everything = _padded(load.context * load.concurrency, 256)
        return everything if window is None else min(everything, _padded(window * load.concurrency + 512, 256))
    tokens = load.context if window is None else min(load.context, window)
    return load.concurrency * _padded(tokens, 16 if runtime == "vllm" else 1)


def activation_bytes(shape: ModelShape, load: Load, runtime: str, place: Place, devices: int = 1) -> int:
    """Working space of one step over the tokens that the runtime computes at once, on all devices."""
    constants = runtime_constants(runtime, place)
    tokens = min(int(constants["batch_tokens"]), max(load.context * load.concurrency, 1))
    layer = (3 * shape.intermediate + 4 * shape.hidden) * int(constants["activation_bytes"])
    rows = min(int(constants["logit_rows"]), tokens) if constants["logits"] == "rows" else min(load.concurrency, tokens)
    logits = rows * shape.vocabulary * int(constants["logit_bytes"])
    # each device holds its part of a layer, and all the logits are on one
    return tokens * (layer + (devices - 1) * shape.hidden * int(constants["activation_bytes"])) + logits


def serving_parts(
    weights: int, shape: ModelShape, load: Load, runtime: str, place: Place, devices: int = 1, repacked: int = 0
) -> MemoryParts:
    """Memory of serving `weights` bytes of stored tensors, of which llama.cpp's CPU kernels repack `repacked`. Raises
    RecipeError for an unknown runtime or dtype."""
    constants = runtime_constants(runtime, place)
    return MemoryParts(
        weights=weights,
        cache=cache_bytes(shape, load, runtime),
        activations=activation_bytes(shape, load, runtime, place, devices),
        overhead=int(constants["overhead_mib"] * 2**20) * devices,
        reserved=load.reserved,
        repacked=repacked if (runtime, place) == ("llama.cpp", "cpu") else 0,
    )


def largest_context(
    weights: int, shape: ModelShape, load: Load, runtime: str, place: Place, budget: int, devices: int = 1
) -> int:
    """The longest context (in steps of 256, at most the model's own) with which serving stays within `budget` bytes; 0 when
    not even 256 tokens fit."""
    longest = shape.max_context or 131072
    low, high = 0, max(longest // 256, 1)
    while low < high:
        middle = (low + high + 1) // 2
        asked = Load(middle * 256, load.concurrency, load.cache_dtype, load.reserved)
        if serving_parts(weights, shape, asked, runtime, place, devices).needed <= budget:
            low = middle
        else:
            high = middle - 1
    return low * 256


def largest_concurrency(
    weights: int, shape: ModelShape, load: Load, runtime: str, place: Place, budget: int, devices: int = 1
) -> int:
    """The most requests of `load.context` tokens at once within `budget` bytes, up to 1024; 0 when not one fits."""
    low, high = 0, 1024
    while low < high:
        middle = (low + high + 1) // 2
        asked = Load(load.context, middle, load.cache_dtype, load.reserved)
        if serving_parts(weights, shape, asked, runtime, place, devices).needed <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _padded(size: int, step: int) -> int:
    return -(-size // step) * step
