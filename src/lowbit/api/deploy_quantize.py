"""A model and a recipe (or several) -> the spec of the Job that quantizes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lowbit.api.deploy_images import lowbit_image
from lowbit.api.memory import Model
from lowbit.api.quantize import recipe_for
from lowbit.core.errors import RecipeError
from lowbit.deploy.objects.job import RECIPES
from lowbit.deploy.objects.jobset import LONGEST_NAME
from lowbit.deploy.objects.pod import MODELS, OUTPUT
from lowbit.deploy.spec import QuantizeSpec, SweepItem, dns_name
from lowbit.pipeline.codes import SAVED_BYTES
from lowbit.pipeline.estimate import ANY_CPU, estimate
from lowbit.pipeline.learn import learning_layers
from lowbit.pipeline.plan import make_plan
from lowbit.recipe import Recipe

GIB = 2**30
_LOCAL_TEXT = ("pydoc", "none", "self")


@dataclass(frozen=True)
class QuantizeWish:
    """What is asked of a Job. methods: one, or several for a sweep. recipe: a file, instead of methods. changes: fields of
    the recipes. claim: NAME[/PATH] of the checkpoint, "" for a hub id. output: NAME of the claim of artifacts. device: cpu
    or cuda. gpus: of a pod. nodes: pods that share one run. parallel: pods of a sweep at once. The rest is as in
    QuantizeSpec."""

    methods: tuple[str, ...] = ("gptq",)
    recipe: Path | None = None
    changes: dict[str, Any] | None = None
    name: str | None = None
    claim: str | None = None
    output: str = "quantized-models"
    create_claim: bool = True
    storage_class: str = ""
    device: str = "auto"
    gpus: int = 1
    nodes: int = 1
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
    _check_sharing(wish, device)
    runs, largest, memory = [], 0, 0
    for name, recipe in recipes.items():
        size = shapes.size(recipe)
        _check_shared(shapes, name, size.recipe, wish.gpus * wish.nodes)
        largest += size.file
        memory = max(memory, _memory(shapes, size.recipe, device, wish.gpus))
        suffix = ".gguf" if recipe.format == "gguf" else ""
        runs.append(SweepItem(name=dns_name(name), recipe=size.recipe.yaml(), output=f"{base}-{name}{suffix}"))
    claim, path = _claim(model, wish, base)
    offline = bool(claim) and all(_is_local(recipe) for recipe in recipes.values())
    further = ["--", "--device", device, *(["--no-verify"] if wish.no_verify else [])]
    place = f"{MODELS}/{path}" if claim else str(model)
    index = []
    if wish.nodes > 1:
        index = ["--index", "0"]  # the pod's own index is its node's rank
    elif wish.gpus > 1:
        further += ["--gpus", str(wish.gpus)]
    cpu = wish.cpu or (8 if device == "cpu" else 4 * wish.gpus)
    # buffers of NCCL between the GPUs of a node
    shm = GIB * wish.gpus if wish.gpus > 1 or wish.nodes > 1 else 0
    name = dns_name(wish.name or f"quantize-{base}")
    try:
        return QuantizeSpec(
            name=name if wish.nodes == 1 else name[:LONGEST_NAME].rstrip("-"),
            image=lowbit_image(device, wish.image),
            command=("python", "-m", "lowbit.deploy.job_entry"),
            args=("--model", place, "--recipes", RECIPES, "--output", OUTPUT, *index, *further),
            # torchrun would set it to 1
            env={"OMP_NUM_THREADS": str(max(1, cpu // wish.gpus))} if device == "cpu" or shm else {},
            cpu=cpu,
            memory=wish.memory or memory + shm,
            gpus=wish.gpus if device == "cuda" else 0,
            nodes=wish.nodes,
            shm=shm,
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
            retries=6 if wish.nodes == 1 else 3,
            queue=wish.queue,
            offline=offline,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
                          hint="lowbit deploy quantize -h") from error  # fmt: skip


def _check_sharing(wish: QuantizeWish, device: str) -> None:
    if wish.nodes > 1 and (len(wish.methods) > 1 and wish.recipe is None):
        raise RecipeError("several nodes share one run, and several methods are several runs",
                          hint="--method ONE --nodes N, or --methods a,b,c --parallel N")  # fmt: skip
    if wish.gpus * wish.nodes > 1 and device != "cuda":
        raise RecipeError("processes share a run on GPUs alone", hint="--device cuda, or neither --gpus nor --nodes")


def _check_shared(shapes: Model, name: str, recipe: Recipe, processes: int) -> None:
    """What the pipeline does not share between processes is refused before anything is written."""
    if processes == 1:
        return
    if recipe.format == "gguf":
        raise RecipeError(f"{name}: a GGUF file is made by one process", hint="neither --gpus nor --nodes")
    if recipe.tune.steps or learning_layers(make_plan(recipe, shapes.streamed).layers):
        raise RecipeError(f"{name}: what is learned is learned on one GPU", hint="neither --gpus nor --nodes")
    if recipe.calibration.num_samples < processes:
        raise RecipeError(f"{name}: {recipe.calibration.num_samples} calibration windows cannot be shared by {processes} "
                          "GPUs", hint=f"--num-samples of at least {processes}")  # fmt: skip


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
        made[method] = recipe.updated(**own)
    if len(made) != len(wish.methods):
        raise RecipeError("a method is named twice", hint="each once")
    return made


def _memory(shapes: Model, recipe: Recipe, device: str, gpus: int) -> int:
    """Bytes of the container: the pipeline's estimate with a third to spare; beside GPUs, what each process reads ahead."""
    if recipe.format == "gguf":
        least = 4 * GIB + 4 * 4 * shapes.shape.vocabulary * shapes.shape.hidden
        need = shapes.gguf_estimate(recipe, ANY_CPU, torch.bfloat16).memory
        return max(least, int(1.33 * need) + 2 * GIB) if device == "cpu" else least
    plan = make_plan(recipe, shapes.streamed)
    need = estimate(plan, shapes.streamed, recipe, ANY_CPU).memory
    block = 2 * sum(parameter.numel() for parameter in shapes.streamed.blocks[0].parameters())
    ends = 2 * 2 * shapes.shape.vocabulary * shapes.shape.hidden
    return int(1.33 * need) + 2 * GIB + ends if device == "cpu" else 4 * GIB + gpus * (4 * GIB + 4 * block + 2 * ends)


def _states(recipes: dict[str, Recipe], shapes: Model) -> int:
    return max(_states_of(recipe, shapes) for recipe in recipes.values())


def _states_of(recipe: Recipe, shapes: Model) -> int:
    """Bytes of the states between two blocks and, where codes are trained, of their training as it is saved."""
    text, tune = recipe.calibration, recipe.tune
    window = 2 * text.seq_len * shapes.shape.hidden
    states = 2 * text.num_samples * window
    if not tune.steps or not tune.codes:
        return states
    weights = sum(parameter.numel() for parameter in shapes.streamed.blocks.parameters())
    return states + tune.self_samples * window + SAVED_BYTES * weights


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
