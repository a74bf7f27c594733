"""The environment variables of quantization while loading, read strictly. No library reads them; our launcher does.

LOAD_IN_8BIT=true                      LLM.int8()
LOAD_IN_4BIT=true                      4 bits, by
  BNB_4BIT_QUANT_TYPE                  nf4 (default) or fp4
  BNB_4BIT_COMPUTE_DTYPE               bfloat16 (default), float16 or float32
  BNB_4BIT_USE_DOUBLE_QUANT            true: the scales in 8 bits too; default false
"""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.core.errors import RecipeError, did_you_mean
from lowbit.runtimes.description import BitsAndBytes

QUANT_TYPES = ("nf4", "fp4")
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
_YES, _NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "")
_DETAILS = ("BNB_4BIT_QUANT_TYPE", "BNB_4BIT_COMPUTE_DTYPE", "BNB_4BIT_USE_DOUBLE_QUANT")


def from_variables(variables: Mapping[str, str]) -> BitsAndBytes | None:
    """What they ask for; None for no quantization. Raises RecipeError for values that are no values, for both widths at
    once, and for details of 4 bits where 4 bits are not asked for."""
    eight, four = _flag(variables, "LOAD_IN_8BIT"), _flag(variables, "LOAD_IN_4BIT")
    if eight and four:
        raise RecipeError("LOAD_IN_8BIT and LOAD_IN_4BIT are both true", hint="set one of them")
    quant_type = _one_of(variables, "BNB_4BIT_QUANT_TYPE", QUANT_TYPES)
    compute_dtype = _one_of(variables, "BNB_4BIT_COMPUTE_DTYPE", COMPUTE_DTYPES)
    double_quant = _flag(variables, "BNB_4BIT_USE_DOUBLE_QUANT")
    if four:
        return BitsAndBytes(4, quant_type, compute_dtype, double_quant)
    given = [name for name in _DETAILS if variables.get(name)]
    if given:
        raise RecipeError(f"{given[0]} is set, but LOAD_IN_4BIT is not true", hint="LOAD_IN_4BIT=true")
    return BitsAndBytes(8) if eight else None


def to_variables(chosen: BitsAndBytes | None) -> dict[str, str]:
    """The inverse."""
    if chosen is None:
        return {}
    if chosen.bits == 8:
        return {"LOAD_IN_8BIT": "true"}
    return {
        "LOAD_IN_4BIT": "true",
        "BNB_4BIT_QUANT_TYPE": chosen.quant_type,
        "BNB_4BIT_COMPUTE_DTYPE": chosen.compute_dtype,
        "BNB_4BIT_USE_DOUBLE_QUANT": "true" if chosen.double_quant else "false",
    }


def _flag(variables: Mapping[str, str], name: str) -> bool:
    value = variables.get(name, "").strip().lower()
    if value not in (*_YES, *_NO):
        raise RecipeError(f"{name}={variables[name]!r} is neither true nor false", hint=f"{name}=true or {name}=false")
    return value in _YES


def _one_of(variables: Mapping[str, str], name: str, known: tuple[str, ...]) -> str:
    value = variables.get(name, "").strip().lower() or known[0]
    if value not in known:
        raise RecipeError(
            f"{name}={variables[name]!r} is unknown{did_you_mean(value, known)}", hint=f"one of {', '.join(known)}"
        )
    return value
