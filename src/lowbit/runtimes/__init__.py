"""What serves an artifact: one file each, which describes the runtime as data and says how it is started.

Another package adds a runtime with an entry point in the group "lowbit.runtimes": its name, and "module:OBJECT" of a
lowbit.runtimes.description.Runtime.
"""

from __future__ import annotations

from lowbit.core.errors import RecipeError
from lowbit.core.registry import Registry
from lowbit.runtimes.description import Runtime

RUNTIMES = Registry(
    "runtime",
    {
        "llama.cpp": "lowbit.runtimes.llama_cpp:LLAMA_CPP",
        "vllm": "lowbit.runtimes.vllm:VLLM",
        "transformers": "lowbit.runtimes.transformers:TRANSFORMERS",
        "tensorrt-llm": "lowbit.runtimes.tensorrt_llm:TENSORRT_LLM",
    },
)


def get_runtime(name: str) -> Runtime:
    """The runtime called `name`. Raises RecipeError for an unknown name, or an object that is not a runtime."""
    found = RUNTIMES.get(name)
    if not isinstance(found, Runtime):
        raise RecipeError(f"runtime {name!r} of another package is not a lowbit.runtimes.description.Runtime")
    return found
