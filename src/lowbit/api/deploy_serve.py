"""A model and a runtime -> the spec of its deployment: the runtime's own command, memory and probes from the bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from lowbit.api.deploy_images import lowbit_image, runtime_image
from lowbit.api.memory import Model
from lowbit.api.quantize import recipe_for
from lowbit.core.errors import ArchitectureError, LowbitError, RecipeError
from lowbit.deploy.objects.metrics import QUEUES
from lowbit.deploy.objects.pod import MODELS
from lowbit.deploy.spec import ServeSpec, Volume, dns_name
from lowbit.pipeline.plan import make_plan
from lowbit.recommend.hardware import Hardware, parse_hardware
from lowbit.recommend.memory import Load, MemoryParts, serving_parts
from lowbit.runtimes import get_runtime
from lowbit.runtimes.artifact import Artifact, label, read_artifact
from lowbit.runtimes.choose import refuse
from lowbit.runtimes.description import BitsAndBytes, Runtime, ServeOptions
from lowbit.runtimes.machine import Gpu, Machine

GIB = 2**30
_KSERVE_MODELS = "/mnt/models"
# seconds from loaded to ready: graphs and kernels are compiled, caches allotted
_WARMUP = {("vllm", "cuda"): 240, ("vllm", "cpu"): 180, ("llama.cpp", "cpu"): 20, ("llama.cpp", "cuda"): 30,
           ("tensorrt-llm", "cuda"): 300}  # fmt: skip
_FORMATS = {"fp8": "fp8", "gptq": "gptq", "awq": "awq", "bitsandbytes": "bitsandbytes", "modelopt": "modelopt",
            "compressed-tensors": "compressed-tensors"}  # fmt: skip


@dataclass(frozen=True)
class ServeWish:
    """What is asked of a deployment; None is filled in. method, format: of a model that is not quantized
    yet. hardware: as in
    `lowbit recommend`, of one node's GPUs or CPU. source: claim:NAME[/PATH], image:REF[/PATH] or hub:ID[@REVISION].
    secret: of the API key, "" for none. The rest is as in ServeSpec and ServeOptions."""

    runtime: str
    method: str | None = None
    format: str | None = None
    name: str | None = None
    device: str = "auto"
    hardware: str | None = None
    gpus: int | None = None
    nodes: int = 1
    context: int | None = None
    parallel: int = 8
    cpu: int | None = None
    memory: int | None = None
    image: str | None = None
    puller: str | None = None
    source: str | None = None
    replicas: int = 1
    max_replicas: int = 4
    autoscale: Literal["none", "hpa", "keda"] = "none"
    route: Literal["none", "ingress", "gateway"] = "none"
    host: str = "model.example.com"
    kserve: bool = False
    monitoring: bool = True
    secret: str | None = None
    token_secret: str = ""
    node_selector: dict[str, str] | None = None
    bitsandbytes: BitsAndBytes | None = None
    drain: int = 30
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServeDeployment:
    """A spec, what it was made from, and the memory on the serving device (None: the model is unknown to the model)."""

    spec: ServeSpec
    artifact: Artifact
    options: ServeOptions
    runtime: Runtime
    memory: MemoryParts | None
    hardware: Hardware | None


def serve_spec(model: str | Path, wish: ServeWish) -> ServeDeployment:
    """The spec of serving `model`: an artifact, .gguf file or hub id as it is, or what `wish.method` will make of it.

    Raises LowbitError subclasses for what the runtime or the hardware cannot do, with what would do instead.
    """
    runtime = get_runtime(wish.runtime)
    hardware = parse_hardware(wish.hardware) if wish.hardware else None
    device = _device(wish, hardware)
    shapes = _opened(model)
    artifact = _artifact(model, wish, shapes)
    _check(runtime, artifact, wish, hardware, device)
    source = _source(model, wish, artifact)
    inside = replace(artifact, location=_location(source, artifact, wish))
    gpus, memory = _gpus(runtime, artifact, shapes, wish, hardware, device)
    cpu = wish.cpu or (8 if device == "cpu" else 4 * max(gpus, 1))
    options = ServeOptions(
        host="0.0.0.0",
        port=runtime.port,
        name=artifact.name,
        context=_context(artifact, wish),
        parallel=wish.parallel,
        threads=cpu if device == "cpu" else None,
        device=device,
        tensor_parallel=gpus * wish.nodes if device == "cuda" else 1,
        cache_gib=math.ceil(memory.cache / GIB) if memory and device == "cpu" else 0,
        bitsandbytes=wish.bitsandbytes,
        drain=wish.drain,
        extra=wish.extra,
    )
    shm = 2 * GIB * gpus if runtime.name in ("vllm", "tensorrt-llm") and gpus else GIB if runtime.name == "vllm" else 0
    program = runtime.program if runtime.image_program is None else runtime.image_program
    metric = QUEUES.get(runtime.name)
    _check_scaling(wish, runtime, device)
    name = dns_name(wish.name or artifact.name)
    try:
        spec = ServeSpec(
            name=name,
            image=runtime_image(runtime, device, wish.image),
            command=program,
            args=tuple(runtime.argv(inside, options, ())),
            env={"HF_HUB_OFFLINE": "1", **runtime.variables(inside, options)},
            cpu=cpu,
            memory=wish.memory or _host_memory(artifact, memory, device, gpus, shm, options),
            gpus=gpus,
            node_selector=wish.node_selector or {},
            token_secret=wish.token_secret,
            runtime=runtime.name,
            model=artifact.name,
            location=inside.location,
            source=source,
            weight_bytes=artifact.weight_bytes,
            port=runtime.port,
            health_path=runtime.health_path,
            metrics_path=runtime.metrics_path or "",
            metrics_key=runtime.metrics_path is not None and runtime.metrics_path not in runtime.open_paths,
            api_key_variable=runtime.api_key_variable or "",
            api_key_secret=f"{name}-api-key" if wish.secret is None else wish.secret,
            shm=shm,
            warmup=_WARMUP.get((runtime.name, device), 60),
            drain=wish.drain,
            replicas=wish.replicas,
            max_replicas=max(wish.max_replicas, wish.replicas),
            autoscale=wish.autoscale,
            metric=metric,
            monitoring=wish.monitoring,
            route=wish.route,
            host=wish.host,
            nodes=wish.nodes,
            kserve=wish.kserve,
            puller=lowbit_image("cpu", wish.puller) if source.kind == "pull" else None,
            threads=device == "cpu",
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}", hint="lowbit deploy serve -h"
        ) from error
    return ServeDeployment(spec, artifact, options, runtime, memory, hardware)


def _device(wish: ServeWish, hardware: Hardware | None) -> str:
    if wish.device != "auto":
        return wish.device
    if hardware is not None:
        if hardware.kind == "apple":
            raise RecipeError("no cluster node is an Apple GPU", hint="lowbit serve runs there")
        return "cuda" if hardware.kind == "gpu" else "cpu"
    return "cpu" if wish.runtime == "llama.cpp" and not wish.gpus else "cuda"


def _opened(model: str | Path) -> Model | None:
    """None for an artifact whose shapes the memory model does not know."""
    try:
        return Model(model)
    except ArchitectureError:
        return None


def _artifact(model: str | Path, wish: ServeWish, shapes: Model | None) -> Artifact:
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


def _check(runtime: Runtime, artifact: Artifact, wish: ServeWish, hardware: Hardware | None, device: str) -> None:
    if wish.nodes > 1 and (runtime.name != "vllm" or device != "cuda"):
        raise RecipeError(f"{runtime.title} is not deployed over several nodes here", hint="--runtime vllm with GPUs")
    if wish.nodes > 1 and wish.autoscale != "none":
        raise RecipeError("a group of several nodes is not scaled here", hint="--autoscale none")
    if wish.kserve and (runtime.name != "vllm" or wish.nodes > 1):
        raise RecipeError("LLMInferenceService here is for vLLM on one node", hint="without --kserve")
    if wish.bitsandbytes is not None and (runtime.name != "transformers" or artifact.format != "dense"):
        raise RecipeError("quantizing while loading is for unquantized models in transformers",
                          hint="--runtime transformers, or no --load-in")  # fmt: skip
    unquantized = runtime.name == "llama.cpp" and artifact.format != "gguf" and wish.method is None
    hint = "--method q4_k_m serves what that will give" if unquantized else "lowbit recommend"
    if hardware is not None or device == "cpu":
        gpus = () if hardware is None or device == "cpu" else (
            Gpu(hardware.name, round(hardware.cc * 10), hardware.memory, hardware.memory),)  # fmt: skip
        reason = refuse(runtime, artifact, Machine(1, 0, gpus), device)
    else:
        rows = [runtime.support(artifact.format, each) for each in artifact.labels]
        reason = next((row.refused for row in rows if row is not None and row.refused), None)
        if None in rows:
            reason = f"it does not read {artifact.format} {artifact.scheme}"
    if reason is not None:
        raise RecipeError(f"{runtime.title} cannot serve {artifact.name}: {reason}", hint=hint)
    plugins = {row.plugin for each in artifact.labels if (row := runtime.support(artifact.format, each)) and row.plugin}
    if plugins and wish.image is None:
        raise RecipeError(
            f"{runtime.title} needs {', '.join(sorted(plugins))} for {artifact.format}, which its image lacks",
            hint="--image of one that you added it to (see docs/deploy.md), or another method",
        )


def _source(model: str | Path, wish: ServeWish, artifact: Artifact) -> Volume:
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


def _file(artifact: Artifact) -> str:
    return Path(artifact.location).name


def _location(source: Volume, artifact: Artifact, wish: ServeWish) -> str:
    if wish.kserve:
        return _KSERVE_MODELS
    if source.kind == "pull":
        folder = f"{MODELS}/{dns_name(artifact.name)}"
        return f"{folder}/{_file(artifact)}" if artifact.format == "gguf" else folder
    return f"{MODELS}/{source.path}" if source.path else MODELS


def _gpus(
    runtime: Runtime, artifact: Artifact, shapes: Model | None, wish: ServeWish, hardware: Hardware | None, device: str
) -> tuple[int, MemoryParts | None]:
    """GPUs of one pod, and memory. Raises RecipeError when it does not fit the hardware."""
    if device == "cpu":
        need = _need(runtime, artifact, shapes, wish, 1, device)
        if hardware is not None and need is not None and need.needed > hardware.memory:
            raise RecipeError(f"{artifact.name} needs {need.needed / GIB:.1f} GiB, {hardware.name} has "
                              f"{hardware.memory / GIB:.1f}", hint="a smaller --context, or fewer bits")  # fmt: skip
        return 0, need
    if wish.gpus is not None or hardware is None:
        gpus = wish.gpus or 1
        counts = [gpus]
    else:
        heads = shapes.shape.heads if shapes is not None else 1
        counts = [n for n in (1, 2, 4, 8) if heads % n == 0 and (n == 1 or runtime.name in ("vllm", "tensorrt-llm"))]
    need = None
    for gpus in counts:
        need = _need(runtime, artifact, shapes, wish, gpus * wish.nodes, device)
        if need is None or hardware is None or need.total <= 0.9 * hardware.memory * gpus * wish.nodes:
            return gpus, need
    assert need is not None
    assert hardware is not None
    raise RecipeError(
        f"{artifact.name} needs {need.total / GIB:.1f} GiB, more than {counts[-1]} x {hardware.name} have",
        hint="fewer bits, a smaller --context or --parallel, or --nodes",
    )


def _need(
    runtime: Runtime, artifact: Artifact, shapes: Model | None, wish: ServeWish, devices: int, device: str
) -> MemoryParts | None:
    if shapes is None:
        return None
    weights = artifact.weight_bytes
    if wish.bitsandbytes is not None:
        weights = weights * wish.bitsandbytes.bits // 16
    load = Load(_context(artifact, wish), wish.parallel)
    try:
        return serving_parts(weights, shapes.shape, load, runtime.name, "gpu" if device == "cuda" else "cpu", devices,
                             weights if artifact.format == "gguf" and device == "cpu" else 0)  # fmt: skip
    except LowbitError:
        return None


def _context(artifact: Artifact, wish: ServeWish) -> int:
    longest = artifact.context or 4096
    if wish.context is not None and wish.context > longest:
        raise RecipeError(f"{artifact.name} was made for {longest} tokens, not {wish.context}",
                          hint=f"--context {longest}")  # fmt: skip
    return wish.context or min(longest, 4096)


def _host_memory(
    artifact: Artifact, memory: MemoryParts | None, device: str, gpus: int, shm: int, options: ServeOptions
) -> int:
    """Bytes of the container. Beside a GPU: the runtime's processes, and the files while they are read; on a CPU, the
    memory model's sum with a tenth to spare. /dev/shm counts into the limit."""
    if device == "cuda":
        return shm + 6 * GIB + 2 * GIB * max(gpus, 1) + artifact.weight_bytes
    if memory is None:
        return shm + 4 * GIB + 2 * artifact.weight_bytes
    cache = max(0, options.cache_gib * GIB - memory.cache) if options.cache_gib else 0
    # bitsandbytes shrinks weights one by one, from files that are read meanwhile
    files = artifact.weight_bytes // 4 if options.bitsandbytes is not None else 0
    return int(1.1 * (memory.total + cache + files)) + shm + GIB // 2


def _check_scaling(wish: ServeWish, runtime: Runtime, device: str) -> None:
    if wish.autoscale == "none" or QUEUES.get(runtime.name) is not None:
        return
    if wish.autoscale == "keda" or device == "cuda":
        raise RecipeError(
            f"{runtime.title} exports no queue that could be scaled on, and CPUs say little where a GPU works",
            hint="--autoscale none, or --runtime vllm",
        )
