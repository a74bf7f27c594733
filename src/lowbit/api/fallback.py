"""When a result is worse than was asked for: the next better scheme, and so on, until one is good enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lowbit.api.quantize import quantize
from lowbit.api.run import Result, Settings
from lowbit.core.errors import VerificationError
from lowbit.core.progress import Progress
from lowbit.recipe import Recipe, preset

# each is larger and closer to the model than the one before
_GGUF = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16")
_BITS = {2: 3, 3: 4, 4: 8}
# schemes of 4-bit floats -> the preset of 8 bits that the same runtimes load
_FLOATS = {"nf4": "llm_int8", "fp4": "llm_int8", "mxfp4": "fp8", "nvfp4": "fp8"}


def next_better(recipe: Recipe) -> Recipe | None:
    """The recipe to try next, calibration and overrides kept; None when only the unquantized model is better.

    GGUF: the next larger type. Rounding to nearest of 4 bits and less: GPTQ of the same bits. Integers: more bits, at 8 bits
    weights alone. 4-bit floats: 8 bits.
    """
    if recipe.format == "gguf":
        larger = [kind for kind in _GGUF if _rank(kind) > _rank(recipe.method)]
        return recipe.updated(method=larger[0]) if larger and _rank(recipe.method) >= 0 else None
    if recipe.kind in _FLOATS:
        return _with_text_of(preset(_FLOATS[recipe.kind]), recipe)
    if recipe.kind != "int" or recipe.method == "cast":
        return None
    if recipe.method == "rtn" and recipe.bits <= 4 and not recipe.transforms:
        return recipe.updated(method="gptq")
    if recipe.bits in _BITS:
        return recipe.updated(bits=_BITS[recipe.bits])
    if recipe.activations != "none":
        return _with_text_of(preset("int8"), recipe)
    return None


def quantize_with_fallback(
    model: str | Path, *, output: Path, recipe: Recipe, settings: Settings, progress: Progress
) -> Result:
    """`quantize`, and where verification finds the result worse than `settings` allow, again with the next better scheme.

    Raises VerificationError, of the last attempt, when no scheme is good enough; other LowbitErrors as they come.
    """
    current: Recipe | None = recipe
    while current is not None:
        try:
            return quantize(model, output=output, recipe=current, settings=settings, progress=progress)
        except VerificationError as error:
            better = next_better(current)
            if better is None:
                raise
            progress.warn(f"{_name(current)}: {error.message}; trying {_name(better)}")
            current = better
            settings = replace(settings, restart=True)
    raise AssertionError("the loop ends by returning or raising")


def _rank(kind: str) -> int:
    """Place in the ladder; a type that is not in it counts as the nearest by its bits."""
    if kind in _GGUF:
        return _GGUF.index(kind)
    digits = next((char for char in kind if char.isdigit()), None)
    nearest = [i for i, name in enumerate(_GGUF) if digits is not None and name[1] == digits]
    return nearest[-1] if nearest else -1


def _with_text_of(better: Recipe, recipe: Recipe) -> Recipe:
    return better.updated(**recipe.calibration.model_dump(), dtype=recipe.dtype, ignore=recipe.ignore)


def _name(recipe: Recipe) -> str:
    if recipe.format == "gguf":
        return recipe.method
    return f"{recipe.method} {recipe.kind if recipe.kind != 'int' else f'{recipe.bits}-bit'}"
