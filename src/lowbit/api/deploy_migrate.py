"""Old manifests -> the working modern equivalent with the same intent: names, claims, replicas, GPUs, contexts are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from lowbit.api.deploy import quantize_files, server_folder
from lowbit.api.deploy_images import lowbit_image, runtime_image
from lowbit.core.errors import RecipeError
from lowbit.deploy.documents import Document
from lowbit.deploy.objects.job import RECIPES
from lowbit.deploy.objects.metrics import QUEUES
from lowbit.deploy.objects.pod import MODELS, OUTPUT
from lowbit.deploy.spec import QuantizeSpec, ServeSpec, SweepItem, Volume, dns_name
from lowbit.deploy.validate.sizes import weights_of
from lowbit.deploy.validate.view import Container, at, mapping, pods
from lowbit.recipe import Recipe, preset
from lowbit.runtimes import get_runtime
from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.bnb_variables import from_variables
from lowbit.runtimes.description import BitsAndBytes, ServeOptions

GIB = 2**30
_BNB = re.compile(r"LOAD_IN_[48]BIT|BNB_4BIT_.*")


@dataclass
class Migration:
    """What one old object became. files: relative path -> text. notes: what is different, and why."""

    document: Document
    name: str
    files: dict[str, str]
    notes: list[str] = field(default_factory=list)


def migrate(documents: Sequence[Document], *, model: str | None = None, image: str | None = None) -> list[Migration]:
    """Every old quantizer and server among `documents`, made anew.

    model: path below /models (or in its claim), where the old one names none. image: of lowbit, in one's own registry.
    Raises RecipeError when there is nothing that is known.
    """
    made = []
    for document in documents:
        found = _migrated(document, documents, model, image)
        if found is not None:
            made.append(found)
    if not made:
        raise RecipeError(
            "nothing here quantizes or serves a model in a way that is known",
            hint="lowbit deploy validate FILE says what is wrong; lowbit deploy serve and quantize write new ones",
        )
    return made


def _migrated(
    document: Document, documents: Sequence[Document], model: str | None, image: str | None
) -> Migration | None:
    if document.kind == "ConfigMap":
        return _awq(document, documents, image)
    for pod in pods(document):
        for container in pod.containers:
            if document.kind in ("Job", "CronJob", "Pod") and re.search(r"auto_?gptq", container.line):
                return _gptq(container, image)
            if "quantization/quantize.py" in container.line:
                return _modelopt(container, documents, image)
            if any(_BNB.fullmatch(name) for name in container.env):
                return _bitsandbytes(container, model, image)
            if container.runtime in ("vllm", "llama.cpp", "tensorrt-llm") and document.kind in ("Deployment", "Pod"):
                return _server(container, image)
    return None


def _gptq(container: Container, image: str | None) -> Migration:
    recipe = preset("gptq").updated(
        bits=_int(container.flag("--bits")),
        group_size=_int(container.flag("--group-size")),
        dataset=container.flag("--dataset"),
        num_samples=_int(container.flag("--num-samples")),
        format="gptq",
    )
    notes = ["python -m auto_gptq.quantize never existed; lowbit's GPTQ writes the same format, with a smaller error."]
    if (container.flag("--desc-act") or "").lower() == "true":
        notes.append("desc_act became the static activation order: its accuracy, in groups that vLLM loads.")
    dataset = recipe.calibration.dataset
    if not dataset.startswith("/"):
        notes.append(f"{dataset} is still downloaded by the pod; a text file on the model's volume needs no internet.")
    source = container.flag("--model-name", "--model-dir", "--model") or "model"
    return _job(container.document, recipe, container, source, container.flag("--output-dir"), image, notes)


def _modelopt(container: Container, documents: Sequence[Document], image: str | None) -> Migration:
    kind = container.flag("--qformat") or "fp8"
    method = {"int8_sq": "int8_sq", "fp8": "fp8_static", "int4_awq": "awq", "nvfp4": "nvfp4"}.get(kind, "fp8_static")
    stored = {"format": "modelopt"} if method in ("fp8_static", "nvfp4") else {}
    recipe = preset(method).updated(num_samples=_int(container.flag("--calib-size")), **stored)
    notes = ["Triton's image has no quantize.py; the Job runs lowbit, and has volumes and a restartPolicy."]
    if kind == "int8_sq":
        notes.append(
            "TensorRT-LLM 1.x reads no INT8 SmoothQuant checkpoint: this one is W8A8 in compressed-tensors, which vLLM serves "
            "with INT8 tensor cores. To stay with TensorRT-LLM use --method fp8_static --format modelopt (L4, H100 or newer)."
        )
    source = container.flag("--model-dir") or "model"
    return _job(container.document, recipe, container, source, container.flag("--output-dir"), image, notes)


def _awq(document: Document, documents: Sequence[Document], image: str | None) -> Migration | None:
    script = next((text for text in mapping(document.content.get("data")).values()
                   if "AutoAWQForCausalLM" in str(text)), None)  # fmt: skip
    if script is None:
        return None

    def value(pattern: str) -> str | None:
        match = re.search(pattern, str(script))
        return match[1] if match else None

    zero_point = (value(r"[\"']zero_point[\"']\s*:\s*(\w+)") or "True") == "True"
    recipe = preset("awq").updated(
        bits=_int(value(r"[\"']w_bit[\"']\s*:\s*(\d+)")),
        group_size=_int(value(r"[\"']q_group_size[\"']\s*:\s*(\d+)")),
        symmetric=None if zero_point else True,
    )
    source = value(r"model_path\s*=\s*[\"']([^\"']+)") or value(r"from_pretrained\(\s*[\"']([^\"']+)") or "model"
    output = value(r"quant_path\s*=\s*[\"']([^\"']+)") or value(r"save_quantized\(\s*[\"']([^\"']+)")
    notes = ["AutoAWQ is archived; lowbit's AWQ writes the same GEMM format, from a recipe instead of a script.",
             "Nothing ran the script: there is a Job now."]  # fmt: skip
    neighbour = next((container for other in documents for pod in pods(other) for container in pod.containers
                      if re.search(r"auto_?gptq|awq", container.line) and container.mounts), None)  # fmt: skip
    return _job(document, recipe, neighbour, source, output, image, notes)


def _job(
    document: Document, recipe: Recipe, container: Container | None, source: str, output: str | None,
    image: str | None, notes: list[str],
) -> Migration:  # fmt: skip
    model_claim, path = _claim(container, source, "models")
    output_claim, _ = _claim(container, output or OUTPUT, "quantized-models")
    known = container is not None and bool(_claim(container, output or "", "")[0])
    if not known:
        notes.append(f"No volume said where things lie: claims {model_claim!r} and {output_claim!r} are assumed.")
    weights = weights_of(source) or 16e9
    wanted = container.amount("limits", "memory") if container is not None else None
    # blocks, both ends of the vocabulary and the libraries; not the model
    memory = max(int(8 * GIB + 0.15 * weights), 12 * GIB)
    if wanted is not None and wanted > memory:
        notes.append(
            f"Memory: {math.ceil(memory / GIB)}Gi of {math.ceil(wanted / GIB)}Gi are enough, blocks are streamed."
        )
    name = dns_name(document.name or "quantize")
    place = PurePosixPath(output).name if output else f"{PurePosixPath(source).name}-{recipe.method}"
    spec = QuantizeSpec(
        name=name,
        image=lowbit_image("cuda", image),
        command=("python", "-m", "lowbit.deploy.job_entry"),
        args=("--model", f"{MODELS}/{path}", "--recipes", RECIPES, "--output", OUTPUT, "--", "--device", "cuda"),
        memory=memory,
        gpus=1,
        model=f"{MODELS}/{path}",
        model_claim=model_claim,
        runs=(SweepItem(name=dns_name(recipe.method), recipe=recipe.yaml(), output=place),),
        output_claim=output_claim,
        output_bytes=int(weights * recipe.bits / 16 * 1.4) + 8 * GIB,
        create_claim=not known,
    )
    notes.append("A pod that is evicted goes on from the journal; the result appears under its name when it is whole.")
    return Migration(document, name, quantize_files(spec), notes)


def _server(container: Container, image: str | None) -> Migration:
    runtime = get_runtime(container.runtime)
    device = "cuda" if container.gpus else "cpu"
    notes = []
    source = container.model or "model"
    claim, path = _claim(container, source, "models")
    context = _int(container.flag("--max-model-len", "--ctx-size", "-c", "--max-seq-len"))
    slots = _int(container.flag("--parallel", "-np", "--max-num-seqs"))
    threads = _int(container.flag("--threads", "-t")) or _cores(container)
    share = container.flag("--gpu-memory-utilization")
    gpus = int(container.gpus)
    options = ServeOptions(
        host="0.0.0.0", port=runtime.port, name=container.flag("--served-model-name", "--alias"), context=context,
        # llama.cpp shares its context among slots, and one had all of it
        parallel=slots or (1 if runtime.name == "llama.cpp" else 64), threads=threads if device == "cpu" else None,
        device=device, gpu_memory=float(share) if share else 0.9, tensor_parallel=max(gpus, 1), cache_gib=4,
    )  # fmt: skip
    if runtime.name == "llama.cpp" and context and slots:
        options = ServeOptions(**{**vars(options), "context": context // slots})
    artifact = Artifact(f"{MODELS}/{path}", PurePosixPath(source).name.removesuffix(".gguf"), "", ())
    for flag in ("--quantization", "--dtype", "--swap-space", "--task", "--disable-log-requests"):
        if flag in container.flags and runtime.name == "vllm":
            notes.append(f"{flag} is left out: the checkpoint says it, or vLLM no longer knows it.")
    if container.image.endswith(":latest") or "ggerganov" in container.image:
        notes.append(f"The image {container.image} became a pinned one.")
    shm = 2 * GIB * gpus if runtime.name in ("vllm", "tensorrt-llm") and gpus else 0
    if container.shm and container.shm > shm:
        notes.append(f"/dev/shm: {shm // GIB}Gi of {container.shm / GIB:.0f}Gi; it counts into the memory limit.")
    weights = int(weights_of(source) or 0)
    limit = int(container.amount("limits", "memory") or 0)
    memory = max(limit, weights + shm + (8 if gpus else 2) * GIB)
    if memory > limit:
        notes.append(
            f"Memory: {math.ceil(memory / GIB)}Gi, for weights, /dev/shm and the runtime (estimated by the name)."
        )
    return _serve(container, runtime.name, artifact, options, claim, path, memory, weights, shm, image, notes)


def _bitsandbytes(container: Container, model: str | None, image: str | None) -> Migration:
    given = {name: str(entry.get("value") or "") for name, (_, entry) in container.env.items() if _BNB.fullmatch(name)}
    notes = ["No library reads these variables; lowbit's launcher of transformers does, and refuses contradictions."]
    four = given.get("LOAD_IN_4BIT", "").lower() in ("true", "1")
    if four and given.pop("LOAD_IN_8BIT", "").lower() in ("true", "1"):
        notes.append("8 and 4 bits were both asked for: 4 bits are kept, as the BNB_4BIT_ variables go with them.")
    wanted: BitsAndBytes | None = from_variables(given)
    source = model or container.model or "model"
    if not model and not container.model:
        notes.append("No model was named: /models/model is assumed; --model PATH says which.")
    claim, path = _claim(container, source, "models")
    runtime = get_runtime("transformers")
    options = ServeOptions(host="0.0.0.0", port=runtime.port, device="cuda", bitsandbytes=wanted)
    artifact = Artifact(f"{MODELS}/{path}", PurePosixPath(path).name, "dense", ("w16a16",))
    weights = int(weights_of(source) or 0)
    memory = max(int(container.amount("limits", "memory") or 0), weights + 8 * GIB)
    return _serve(container, "transformers", artifact, options, claim, path, memory, weights, 0, image, notes)


def _serve(
    container: Container, name: str, artifact: Artifact, options: ServeOptions, claim: str, path: str, memory: int,
    weights: int, shm: int, image: str | None, notes: list[str],
) -> Migration:  # fmt: skip
    runtime, document = get_runtime(name), container.document
    release = dns_name(document.name or f"{artifact.name}-server")
    replicas = at(document.content, "spec", "replicas")
    program = runtime.program if runtime.image_program is None else runtime.image_program
    spec = ServeSpec(
        name=release,
        image=runtime_image(runtime, options.device, image if name == "transformers" else None),
        command=program,
        args=tuple(runtime.argv(artifact, options, ())),
        env={"HF_HUB_OFFLINE": "1", **runtime.variables(artifact, options)},
        cpu=options.threads or 4 * max(options.tensor_parallel, 1),
        memory=memory,
        gpus=options.tensor_parallel if options.device == "cuda" else 0,
        node_selector={str(k): str(v) for k, v in mapping(container.pod.spec.get("nodeSelector")).items()},
        runtime=name,
        model=options.name or artifact.name,
        location=artifact.location,
        source=Volume(kind="claim", ref=claim, path=path),
        weight_bytes=weights,
        port=runtime.port,
        health_path=runtime.health_path,
        metrics_path=runtime.metrics_path or "",
        metrics_key=runtime.metrics_path is not None and runtime.metrics_path not in runtime.open_paths,
        api_key_variable=runtime.api_key_variable or "",
        api_key_secret=f"{release}-api-key",
        shm=shm,
        warmup=240 if options.device == "cuda" else 60,
        replicas=replicas if isinstance(replicas, int) and replicas > 0 else 1,
        metric=QUEUES.get(name),
        threads=options.device == "cpu",
    )
    notes.append(
        "New: probes sized to the load, an API key from a Secret, non-root, a Service and what a review asks for."
    )
    if runtime.api_key_variable:
        notes.append(f"Clients need the key in Secret {spec.api_key_secret}, which has to be made first (README.md).")
    title = f"{artifact.name} by {runtime.title}, instead of {document.kind or 'the variables'} {document.name}".strip()
    return Migration(document, release, server_folder(spec, title), notes)


def _claim(container: Container | None, path: str, fallback: str) -> tuple[str, str]:
    """The claim that holds a path of a container, and the path inside it."""
    for mount in container.mounts if container is not None else ():
        place = str(mount.get("mountPath")).rstrip("/")
        if container is not None and (path == place or path.startswith(place + "/")):
            claim: Any = at(container.pod.volume(str(mount.get("name"))), "persistentVolumeClaim", "claimName")
            if claim:
                inside = "/".join(filter(None, [str(mount.get("subPath") or ""), path[len(place) :].strip("/")]))
                return str(claim), inside
    parts = PurePosixPath(path).parts
    return fallback, "/".join(parts[2:] if path.startswith("/") and len(parts) > 2 else parts).strip("/")


def _cores(container: Container) -> int:
    return int(container.amount("limits", "cpu") or container.amount("requests", "cpu") or 8)


def _int(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
