"""The recipe: everything that decides what an artifact contains, as one validated object; YAML or flags.

recipe = Recipe(method="gptq", bits=4, group_size=128)
recipe = Recipe.load("recipe.yaml")
recipe = preset("gptq").updated(bits=3)
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lowbit.core.errors import RecipeError, did_you_mean


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Kind = Literal["int", "float", "nf4", "fp4", "mxfp4", "nvfp4"]
Granularity = Literal["auto", "tensor", "channel", "group", "block"]
Activations = Literal["none", "int8", "int8_static", "fp8", "fp8_static", "fp8_group", "mxfp4", "nvfp4"]


class Calibration(_Strict):
    """Text that the model is watched on: `num_samples` windows of `seq_len` tokens of `dataset` (see lowbit.core.text)."""

    dataset: str = "c4"
    num_samples: int = Field(128, ge=1)
    seq_len: int = Field(2048, ge=2)
    seed: int = 0


class Tune(_Strict):
    """The last pass over all scales and norms (lowbit.pipeline.tune): `steps` gradient steps of `batch` windows; 0: none.

    codes: the largest step of a weight along its grid, in the grid's own steps; 0 leaves codes alone. self_samples: windows
    that the model writes itself, besides those of the calibration, for this pass only.
    """

    steps: int = Field(0, ge=0)
    rate: float = Field(3e-3, gt=0)
    batch: int = Field(8, ge=1)
    codes: float = Field(0.0, ge=0)
    self_samples: int = Field(0, ge=0)


class Override(_Strict):
    """Other numbers for the linear layers whose path matches: a glob ("*.mlp.*"), or a regular expression after "re:"."""

    match: str
    method: str | None = None
    kind: Kind | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    granularity: Granularity | None = None
    activations: Activations | None = None


class Recipe(_Strict):
    """One run of `lowbit quantize`.

    method: how numbers are chosen ("cast", "rtn", "gptq", ...); options: that method's own settings.
    kind: of the weights' numbers, integers or a 4 or 8 bit float; bits, symmetric: of integers. group_size: columns that
    share a scale, 0 is one scale per output channel, "auto" picks the largest of 128, 64, 32 that divides every layer's
    inputs. granularity: "auto" follows from group_size; "tensor" is one scale a layer, "block" one for a square.
    activations: what inputs are rounded to at run time: scales found there for each token (int8, fp8) or group of
    channels (fp8_group, mxfp4, nvfp4), or one scale from calibration (int8_static, fp8_static).
    kv_cache: "fp8" stores scales for a cache of 8 bit floats.
    tune: a last end-to-end pass over scales and norms.
    transforms: name -> options of what is done to the weights first, in order.
    format: how they are stored. dtype: of everything left unquantized ("auto": as in the checkpoint).
    ignore: layers left in 16 bits, by glob or "re:...".
    """

    method: str = "gptq"
    kind: Kind = "int"
    bits: int = Field(4, ge=2, le=16)
    group_size: int | Literal["auto"] = 128
    symmetric: bool = True
    granularity: Granularity = "auto"
    activations: Activations = "none"
    kv_cache: Literal["none", "fp8"] = "none"
    format: str = "compressed-tensors"
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    options: dict[str, Any] = Field(default_factory=dict)
    transforms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    sequential: bool = True
    tune: Tune = Field(default_factory=lambda: Tune.model_validate({}))
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[Override, ...] = ()
    calibration: Calibration = Field(default_factory=lambda: Calibration.model_validate({}))

    @field_validator("transforms", mode="before")
    @classmethod
    def _named_transforms(cls, value: Any) -> Any:
        """A list of names means each with its defaults."""
        return value if isinstance(value, dict) else {name: {} for name in value or ()}

    @classmethod
    def load(cls, file: str | Path) -> Recipe:
        """A recipe from YAML. Raises RecipeError."""
        try:
            content = yaml.safe_load(Path(file).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise RecipeError(f"recipe {file} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise RecipeError(f"recipe {file} is not a mapping", hint="lowbit recipe show gptq prints one")
        return cls.parse(content, str(file))

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str = "the recipe") -> Recipe:
        """A recipe from plain data. Raises RecipeError that names the field."""
        try:
            return cls.model_validate(dict(content))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            known = [*cls.model_fields, *Calibration.model_fields]
            suggestion = did_you_mean(field, known) if first["type"] == "extra_forbidden" else ""
            message = "is no field of a recipe" if first["type"] == "extra_forbidden" else first["msg"].lower()
            raise RecipeError(f"{where}: {field} {message}{suggestion}", hint="lowbit recipe show gptq") from error

    def updated(self, **changes: Any) -> Recipe:
        """The recipe with other values; None leaves a field as it is; calibration fields may be named directly. Another kind
        of numbers has other groups: without a group_size beside it that becomes "auto".

        transform_options go to every transform of the recipe. Raises RecipeError.
        """
        content = self.model_dump()
        if changes.get("kind") not in (None, self.kind):
            content["group_size"] = "auto"
        for name, value in changes.items():
            if value is None:
                continue
            if name in Calibration.model_fields:
                content["calibration"][name] = value
            elif name == "options":
                content["options"] = {**content["options"], **value}
            elif name == "tune_steps":
                content["tune"]["steps"] = value
            elif name == "transform_options":
                content["transforms"] = _with_options(content["transforms"], value)
            else:
                content[name] = value
        return Recipe.parse(content)

    def yaml(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def ignores(self, path: str) -> bool:
        """Whether a linear layer is left in 16 bits."""
        return any(matches(pattern, path) for pattern in self.ignore)

    def override_for(self, path: str) -> Override | None:
        """The last override that matches a linear layer."""
        return next((override for override in reversed(self.overrides) if matches(override.match, path)), None)


def _with_options(transforms: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    if not transforms:
        raise RecipeError(
            f"{', '.join(options)} is a setting of a transform, and the recipe has none",
            hint="--method int8_sq, --method awq or --transform smoothquant",
        )
    return {name: {**own, **options} for name, own in transforms.items()}


def matches(pattern: str, path: str) -> bool:
    """Whether a glob, or a regular expression after "re:", matches a module path."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], path) is not None
    return fnmatch.fnmatchcase(path, pattern)


def preset_names() -> list[str]:
    """The recipes that lowbit carries."""
    files = resources.files("lowbit.presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def preset(name: str) -> Recipe:
    """A recipe that lowbit carries, by name. Raises RecipeError with the nearest name."""
    if name not in preset_names():
        raise RecipeError(
            f"method {name!r} is unknown{did_you_mean(name, preset_names())}",
            hint=f"one of {', '.join(preset_names())}",
        )
    text = resources.files("lowbit.presets").joinpath(f"{name}.yaml").read_text()
    return Recipe.parse(yaml.safe_load(text), f"preset {name}")
