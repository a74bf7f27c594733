"""What `--method q4_k_m` and its like mean: a recipe of format gguf, and its options checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lowbit.core.errors import RecipeError, did_you_mean
from lowbit.core.ggml_types import FILE_TYPE_ALIASES, FILE_TYPES, file_type
from lowbit.methods.kquants.policy import PolicyOptions, parse_tensor_type
from lowbit.methods.learning import LearnOptions
from lowbit.recipe import Recipe

Refine = Literal["none", "imatrix", "hessian"]
NO_TEXT = "none"
_REFINES = ("none", "imatrix", "hessian")


@dataclass(frozen=True)
class GgufOptions:
    """Options of a GGUF recipe.

    refine: "none" encodes as llama-quantize does without statistics, "imatrix" with an importance matrix, "hessian" rounds
    to second order; by default hessian when calibration text is given, imatrix when an `imatrix` file is, else none.
    imatrix: an importance matrix of llama-imatrix or lowbit, instead of calibration.
    pure, leave_output_tensor, output_tensor_type, token_embedding_type, tensor_type (PATTERN=TYPE): as in llama-quantize.
    fit_types: choose the types of matrices anew, so that a file no larger costs the least divergence (gguf_types.py); what
    llama-quantize's options above say of types cannot be given then.
    allow_requantize: take a GGUF file that is quantized already.
    max_shard_size: bytes of data in one file; larger models are split.
    damping, sweeps, asymmetric: of second-order rounding, see SecondOrderOptions.
    learn_steps: gradient steps that every block is trained for after it (learned rounding); 0 for none. learn_batch,
    learn_reach, learn_scale_reach, learn_seed: see LearnOptions.
    """

    refine: Refine | None = None
    imatrix: str | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    tensor_type: tuple[str, ...] = ()
    fit_types: bool = False
    allow_requantize: bool = False
    max_shard_size: int | None = None
    damping: float = 0.03
    sweeps: int = 6
    asymmetric: float = 0.5
    learn_steps: int = 0
    learn_batch: int = 8
    learn_reach: float = 0.5
    learn_scale_reach: float = 0.1
    learn_seed: int = 0

    @property
    def learning(self) -> LearnOptions | None:
        """Of learned rounding; None for none."""
        if not self.learn_steps:
            return None
        return LearnOptions(
            self.learn_steps, self.learn_batch, self.learn_reach, self.learn_scale_reach, self.learn_seed
        )

    def policy(self, *, has_imatrix: bool) -> PolicyOptions:
        """As the type policy has it. Raises FormatError for a malformed PATTERN=TYPE."""
        return PolicyOptions(
            self.pure,
            self.leave_output_tensor,
            self.output_tensor_type,
            self.token_embedding_type,
            tuple(parse_tensor_type(argument) for argument in self.tensor_type),
            has_imatrix,
        )


def is_gguf_method(method: str) -> bool:
    """Whether a method names a llama.cpp file type ("q4_k_m"); bf16 and f32 mean safetensors unless GGUF is asked for."""
    return FILE_TYPE_ALIASES.get(method.upper(), method.upper()) in FILE_TYPES and method.lower() not in ("bf16", "f32")


def gguf_recipe(method: str) -> Recipe:
    """The recipe of a file type: no calibration unless text is named. Raises FormatError for an unknown type."""
    name = file_type({"fp16": "f16"}.get(method.lower(), method)).name.lower()
    return Recipe.parse({"method": name, "format": "gguf", "ignore": (), "calibration": {"dataset": NO_TEXT}})


def spelled_out(recipe: Recipe) -> Recipe:
    """A GGUF recipe with the defaults of all options that it leaves out; any other as it is."""
    if recipe.format != "gguf":
        return recipe
    return Recipe.parse({**recipe.model_dump(), "options": {**asdict(GgufOptions()), **recipe.options}})


def gguf_options(recipe: Recipe) -> GgufOptions:
    """The recipe's options with `refine` decided. Raises RecipeError for unknown ones and for contradictions."""
    known = [field.name for field in fields(GgufOptions)]
    for name in recipe.options:
        if name not in known:
            raise RecipeError(
                f"a GGUF recipe has no option {name!r}{did_you_mean(name, known)}",
                hint=f"its options are {', '.join(known)}",
            )
    given: dict[str, Any] = dict(recipe.options)
    given["tensor_type"] = tuple(given.get("tensor_type") or ())
    text = recipe.calibration.dataset != NO_TEXT
    if given.get("refine") is None:
        given["refine"] = "hessian" if text else "imatrix" if given.get("imatrix") else "none"
    _refuse_contradictions(given, text)
    _refuse_fitting(given)
    options = GgufOptions(**given)
    _refuse_learning(options)
    return options


def _refuse_contradictions(given: dict[str, Any], text: bool) -> None:
    refine = given["refine"]
    if refine not in _REFINES:
        raise RecipeError(f"refine {refine!r} is unknown{did_you_mean(str(refine), _REFINES)}", hint="--refine hessian")
    if refine == "hessian" and not text:
        raise RecipeError("second-order rounding needs calibration text", hint="--dataset wikitext, pydoc or a file")
    if refine == "imatrix" and not text and not given.get("imatrix"):
        raise RecipeError("no importance matrix and no text to make one of", hint="--imatrix FILE, or --dataset TEXT")
    if given.get("imatrix") and refine != "imatrix":
        raise RecipeError(
            f"an importance matrix is of no use to --refine {refine}", hint="--refine imatrix, or leave --imatrix out"
        )
    if given.get("imatrix") and not Path(given["imatrix"]).is_file():
        raise RecipeError(f"importance matrix {given['imatrix']} does not exist")


def names_types(options: Mapping[str, Any]) -> bool:
    """Whether options of a recipe say which types tensors have."""
    named = ("pure", "leave_output_tensor", "output_tensor_type", "token_embedding_type", "tensor_type")
    return any(options.get(name) for name in named)


def _refuse_fitting(given: dict[str, Any]) -> None:
    if given.get("fit_types") and given["refine"] != "hessian":
        raise RecipeError(
            f"types are fitted to calibration text, and refine is {given['refine']!r}",
            hint="--refine hessian with a --dataset, or --no-fit-types",
        )
    if given.get("fit_types") and names_types(given):
        raise RecipeError("types cannot be fitted and named", hint="--no-fit-types, or leave out what names types")


def _refuse_learning(options: GgufOptions) -> None:
    """Options of learned rounding that cannot be."""
    limits: dict[str, tuple[type, float, float]] = {
        "learn_steps": (int, 0, math.inf),
        "learn_batch": (int, 1, math.inf),
        "learn_reach": (float, 0, math.inf),
        # at 1 a scale could become zero
        "learn_scale_reach": (float, 0, 0.99),
        "learn_seed": (int, 0, 2**63 - 1),
    }
    for name, (kind, low, high) in limits.items():
        value = getattr(options, name)
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            what = "whole number" if kind is int else "number"
            between = f"of at least {low:g}" if high > 1 else f"from {low:g} to {high:g}"
            default = GgufOptions.__dataclass_fields__[name].default
            raise RecipeError(f"{name} {value!r} is no {what} {between}", hint=f"such as --option {name}={default}")
    if options.learn_steps and options.refine != "hessian":
        raise RecipeError(
            f"learned rounding starts from second-order rounding, and refine is {options.refine!r}",
            hint="--refine hessian with a --dataset, or leave learn_steps out",
        )
