"""What is served, and where it lies in the container: an artifact as it is, or what quantizing a model will give."""

from __future__ import annotations

from pathlib import Path

from lowbit.api.deploy_wish import ServeWish
from lowbit.api.memory import Model
from lowbit.api.quantize import recipe_for
from lowbit.core.errors import ArchitectureError, RecipeError
from lowbit.deploy.objects.pod import MODELS
from lowbit.deploy.spec import Volume, dns_name
from lowbit.pipeline.plan import make_plan
from lowbit.runtimes.artifact import Artifact, label, read_artifact

_KSERVE_MODELS = "/mnt/models"
_FORMATS = {"fp8": "fp8", "gptq": "gptq", "awq": "awq", "bitsandbytes": "bitsandbytes", "modelopt": "modelopt",
            "compressed-tensors": "compressed-tensors"}  # fmt: skip


def opened(model: str | Path) -> Model | None:
    """None for an artifact whose shapes the memory model does not know."""
    try:
        return Model(model)
    except ArchitectureError:
        return None


def deployed_artifact(model: str | Path, wish: ServeWish, shapes: Model | None) -> Artifact:
    """What will be served. Raises RecipeError where nothing is known of it."""
    if wish.method is None and Path(model).exists():
        return read_artifact(model)
    if shapes is None:
        raise RecipeError(f"the shapes of {model} are unknown, so nothing can be sized", hint="quantize it first")
    if wish.method is not None:
        return _planned(shapes, wish, wish.method)
    context = shapes.shape.max_context
    config = shapes.checkpoint.config
    format = _FORMATS.get(shapes.quantized, "dense") if shapes.quantized else "dense"
    name = Path(shapes.name).name
    # of a quantized hub model the layers' schemes are only in its files
    labels = ("w16a16",) if format == "dense" else ()
    return Artifact(shapes.name, name, format, labels, str(config.get("model_type", "")), context, shapes.weights,
                    config=config)  # fmt: skip


def _planned(shapes: Model, wish: ServeWish, method: str) -> Artifact:
    """What quantizing will give. For TensorRT-LLM floats are stored in ModelOpt's format, which is the one that it reads."""
    recipe = recipe_for(method)
    own = "modelopt" if wish.runtime == "tensorrt-llm" and recipe.kind in ("float", "nvfp4") else None
    size = shapes.size(recipe.updated(format=wish.format or own))
    base = Path(shapes.name).name.removesuffix(".gguf").removesuffix(".json") or "model"
    config = {} if shapes.gguf is not None else dict(shapes.checkpoint.config)
    if size.recipe.format == "gguf":
        return Artifact(f"{base}-{method}.gguf", f"{base}-{method}", "gguf", (method.upper(),),
                        shapes.shape.model_type, shapes.shape.max_context, size.file)  # fmt: skip
    layers = make_plan(size.recipe, shapes.streamed).layers.values()
    labels = tuple(sorted({label(layer.scheme) for layer in layers})) or ("w16a16",)
    format = size.recipe.format if layers else "dense"
    return Artifact(f"{base}-{method}", f"{base}-{method}", format, labels, shapes.shape.model_type,
                    shapes.shape.max_context, size.file, config=config)  # fmt: skip


def model_source(model: str | Path, wish: ServeWish, artifact: Artifact) -> Volume:
    """The volume that --source asks for; a claim, or the hub for what is not here. Raises RecipeError."""
    if wish.source is None:
        hub = wish.method is None and not Path(model).exists()
        return Volume(kind="pull", ref=str(model)) if hub else Volume(kind="claim", ref="models", path=_file(artifact))
    kind, colon, ref = wish.source.partition(":")
    if not colon or not ref or kind not in ("claim", "image", "hub"):
        raise RecipeError(
            f"--source {wish.source!r} is unknown", hint="claim:NAME[/PATH], image:REF or hub:ID[@REVISION]"
        )
    if kind == "claim":
        claim, _, path = ref.partition("/")
        return Volume(kind="claim", ref=claim, path=path or _file(artifact))
    if kind == "image":
        return Volume(kind="image", ref=ref, path=Path(artifact.location).name if artifact.format == "gguf" else "")
    repository, _, revision = ref.partition("@")
    return Volume(kind="pull", ref=repository, revision=revision)


def location_of(source: Volume, artifact: Artifact, wish: ServeWish) -> str:
    """The path in the container."""
    if wish.kserve:
        return _KSERVE_MODELS
    if source.kind == "pull":
        folder = f"{MODELS}/{dns_name(artifact.name)}"
        return f"{folder}/{_file(artifact)}" if artifact.format == "gguf" else folder
    return f"{MODELS}/{source.path}" if source.path else MODELS


def _file(artifact: Artifact) -> str:
    return Path(artifact.location).name
