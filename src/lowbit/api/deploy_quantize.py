"""A model and a recipe (or several) -> the spec of the Job that quantizes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowbit.api.deploy_images import lowbit_image
from lowbit.api.memory import Model
from lowbit.api.quantize import recipe_for
from lowbit.core.errors import RecipeError
from lowbit.deploy.objects.job import RECIPES
from lowbit.deploy.objects.pod import MODELS, OUTPUT
from lowbit.deploy.spec import QuantizeSpec, SweepItem, dns_name
from lowbit.pipeline.estimate import estimate
from lowbit.pipeline.plan import make_plan
from lowbit.recipe import Recipe

GIB = 2**30
_LOCAL_TEXT = ("pydoc", "none", "self")


@dataclass(frozen=True)
class QuantizeWish:
    """What is asked of a Job. methods: one, or several for a sweep. recipe: a file, instead of methods. changes: fields of
    the recipes. claim: NAME[/PATH] of the checkpoint, "" for a hub id. output: NAME of the claim of artifacts. device: cpu
    or cuda. parallel: pods of a sweep at once. The rest is as in QuantizeSpec."""

    methods: tuple[str, ...] = ("gptq",)
    recipe: Path | None = None
    changes: dict[str, Any] | None = None
    name: str | None = None
    claim: str | None = None
    output: str = "quantized-models"
    create_claim: bool = True
    storage_class: str = ""
    device: str = "auto"
    gpus: int | None = None
    cpu: int | None = None
    memory: int | None = None
    image: str | None = None
    parallel: int = 1
    queue: str = ""
    token_secret: str = ""
    node_selector: dict[str, str] | None = None
    deadline: int | None = None
    no_verify: bool = False


def quantize_spec(model: str | Path, wish: QuantizeWish) -> QuantizeSpec:
    """The spec of quantizing `model`, a local checkpoint (which lies in `wish.claim` on the cluster), config.json or hub id.
    Memory and disk come from the plans of the recipes. Raises LowbitError subclasses."""
    shapes = Model(model)
    base = Path(str(model)).name.removesuffix(".gguf").removesuffix(".json") or "model"
    recipes = _recipes(wish)
    gguf = any(recipe.format == "gguf" for recipe in recipes.values())
    device = ("cpu" if gguf else "cuda") if wish.device == "auto" else wish.device
    if (wish.gpus or 0) > 1:
        raise RecipeError("one run uses one GPU", hint="--methods a,b,c --parallel N quantizes on several GPUs at once")
    runs, largest, memory = [], 0, 0
    for name, recipe in recipes.items():
        size = shapes.size(recipe)
        largest += size.file
        memory = max(memory, _memory(shapes, size.recipe, device))
        suffix = ".gguf" if recipe.format == "gguf" else ""
        runs.append(SweepItem(name=dns_name(name), recipe=size.recipe.yaml(), output=f"{base}-{name}{suffix}"))
    claim, path = _claim(model, wish, base)
    offline = bool(claim) and all(_is_local(recipe) for recipe in recipes.values())
    further = ["--", "--device", device, *(["--no-verify"] if wish.no_verify else [])]
    place = f"{MODELS}/{path}" if claim else str(model)
    try:
        return QuantizeSpec(
            name=dns_name(wish.name or f"quantize-{base}"),
            image=lowbit_image(device, wish.image),
            command=("python", "-m", "lowbit.deploy.job_entry"),
            args=("--model", place, "--recipes", RECIPES, "--output", OUTPUT, *further),
            env={"OMP_NUM_THREADS": str(wish.cpu or 8)} if device == "cpu" else {},
            cpu=wish.cpu or (8 if device == "cpu" else 4),
            memory=wish.memory or memory,
            gpus=1 if device == "cuda" else 0,
            node_selector=wish.node_selector or {},
            scratch=_scratch(shapes, bool(claim)),
            token_secret=wish.token_secret,
            model=place,
            model_claim=claim,
            runs=tuple(runs),
            parallel=wish.parallel,
            output_claim=wish.output,
            # the artifact, its journal with the states between blocks, and room for the file system
            output_bytes=int(1.2 * largest) + _states(recipes, shapes) + 2 * GIB,
            create_claim=wish.create_claim,
            storage_class=wish.storage_class,
            deadline=wish.deadline or 24 * 3600,
            queue=wish.queue,
            offline=offline,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
                          hint="lowbit deploy quantize -h") from error  # fmt: skip


def _recipes(wish: QuantizeWish) -> dict[str, Recipe]:
    changes = dict(wish.changes or {})
    if wish.recipe is not None:
        recipe = Recipe.load(wish.recipe)
        return {recipe.method: recipe.updated(**changes)}
    made = {}
    for method in wish.methods:
        recipe = recipe_for(method)
        grouped = recipe.kind == "int" and recipe.group_size != 0 and recipe.format != "gguf"
        own = {
            key: value for key, value in changes.items() if key not in ("group_size", "bits", "symmetric") or grouped
        }
        if recipe.format == "gguf" and recipe.calibration.dataset == "none":
            own.pop("dataset", None)
        made[method] = recipe.updated(**own)
    if len(made) != len(wish.methods):
        raise RecipeError("a method is named twice", hint="each once")
    return made


def _memory(shapes: Model, recipe: Recipe, device: str) -> int:
    """Bytes of the container: the pipeline's estimate with a third to spare; beside a GPU, what is read ahead."""
    if recipe.format == "gguf":
        vocabulary = 4 * shapes.shape.vocabulary * shapes.shape.hidden
        return 4 * GIB + 4 * vocabulary
    plan = make_plan(recipe, shapes.streamed)
    text = recipe.calibration
    need = estimate(plan, shapes.streamed, text.num_samples, text.seq_len, sequential=recipe.sequential).memory
    block = 2 * sum(parameter.numel() for parameter in shapes.streamed.blocks[0].parameters())
    ends = 2 * 2 * shapes.shape.vocabulary * shapes.shape.hidden
    return int(1.33 * need) + 2 * GIB + ends if device == "cpu" else 8 * GIB + 4 * block + 2 * ends


def _states(recipes: dict[str, Recipe], shapes: Model) -> int:
    texts = [recipe.calibration for recipe in recipes.values()]
    return max(2 * 2 * text.num_samples * text.seq_len * shapes.shape.hidden for text in texts)


def _scratch(shapes: Model, local: bool) -> int:
    """Of a hub id the checkpoint is downloaded into HOME."""
    return 10 * GIB if local else 10 * GIB + int(1.5 * shapes.weights)


def _claim(model: str | Path, wish: QuantizeWish, base: str) -> tuple[str, str]:
    if wish.claim == "" or (wish.claim is None and not Path(str(model)).exists()):
        return "", ""
    claim, _, path = (wish.claim or "models").partition("/")
    file = Path(str(model))
    return claim, path or (file.name if file.name != "config.json" else file.absolute().parent.name) or base


def _is_local(recipe: Recipe) -> bool:
    parts = recipe.calibration.dataset.split("+")
    return recipe.method in ("rtn", "cast") or all(part in _LOCAL_TEXT or part.startswith("/") for part in parts)
