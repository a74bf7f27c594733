"""lowbit: makes a causal language model low-bit with every mainstream method, and proves what that cost.

import lowbit
result = lowbit.quantize("org/model", output="model-w4", method="gptq", bits=4, group_size=128, dataset="pydoc")
lowbit.evaluate("model-w4", base="org/model")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.api.evaluate import evaluate as evaluate
    from lowbit.api.quantize import quantize as quantize
    from lowbit.recipe import Recipe as Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "evaluate", "quantize"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: `lowbit --help` must not wait for them
    if name == "quantize":
        from lowbit.api.quantize import quantize

        return quantize
    if name == "evaluate":
        from lowbit.api.evaluate import evaluate

        return evaluate
    if name == "Recipe":
        from lowbit.recipe import Recipe

        return Recipe
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
