"""lowbit deploy: write deployments, check anyone's, and apply them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.commands.deploy_check import migrate, validate
from lowbit.commands.deploy_cluster import apply, delete, plan
from lowbit.core.errors import RecipeError

app = typer.Typer(no_args_is_help=True, help="Quantize and serve on Kubernetes (or with compose, systemd, Ollama).")
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.", show_default="deploy-NAME")
]
Target = Annotated[str, typer.Option(help="kubernetes (Kustomize and Helm), compose, systemd or ollama.")]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the overlays.")]
Node = Annotated[
    list[str] | None, typer.Option("--node", metavar="LABEL=VALUE", help="Only nodes with this label; repeatable.")
]
Image = Annotated[
    str | None, typer.Option(metavar="REPOSITORY:TAG[@DIGEST]", help="Container image, instead of the pinned one.")
]
Memory = Annotated[int | None, typer.Option(metavar="GIB", help="Memory of a pod.", show_default="from the bytes")]
Models = Annotated[Path, typer.Option(metavar="DIR", help="compose, systemd, ollama: folder with the model here.")]
Token = Annotated[
    str, typer.Option("--hub-secret", metavar="SECRET", help="Secret with the hub's token under the key token.")
]


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Artifact, .gguf, hub id; or a model and --method.")],
    extra: Annotated[list[str] | None, typer.Argument(metavar="[-- ARGS]", help="More arguments of the runtime.")] = None,
    runtime: Annotated[str, typer.Option(help="vllm, llama.cpp, transformers or tensorrt-llm.")] = "vllm",
    method: Annotated[str | None, typer.Option(help="MODEL is not quantized yet: what it will be.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="With --method, as in lowbit quantize.")] = None,
    output: Output = None,
    target: Target = "kubernetes",
    namespace: Namespace = "",
    name: Annotated[str | None, typer.Option(help="Name of the objects.", show_default="the artifact's")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    hardware: Annotated[str | None, typer.Option(help="A node's GPU or CPU, as in recommend: l4, h100x8, cpu:16c,64g.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of a pod.", show_default="as few as it fits on, or 1")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that share one model (vLLM, LeaderWorkerSet).")] = 1,
    context: Annotated[int | None, typer.Option(min=16, help="Tokens of a sequence.", show_default="at most 4096")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    cpu: Annotated[int | None, typer.Option(min=1, help="Cores; threads on a CPU.")] = None,
    memory: Memory = None,
    image: Image = None,
    puller: Annotated[str | None, typer.Option(metavar="IMAGE", help="With hub: sources, an image that has hf.")] = None,
    source: Annotated[
        str | None, typer.Option(help="claim:NAME[/PATH], image:REF or hub:ID[@REVISION].", show_default="claim:models/NAME")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Pods, at least.")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, help="Pods, at most.")] = 4,
    autoscale: Annotated[str, typer.Option(help="none, hpa or keda.")] = "none",
    route: Annotated[str, typer.Option(help="none, ingress or gateway.")] = "none",
    host: Annotated[str, typer.Option(help="Host name of the route.")] = "model.example.com",
    kserve: Annotated[bool, typer.Option("--kserve", help="KServe's LLMInferenceService instead of a Deployment.")] = False,
    monitoring: Annotated[bool, typer.Option("--monitoring/--no-monitoring", help="Prometheus' ServiceMonitor.")] = True,
    secret: Annotated[
        str | None, typer.Option("--key-secret", metavar="SECRET", help="Secret with the key api-key; '' for none.",
                                 show_default="NAME-api-key")
    ] = None,
    hub_secret: Token = "",
    node: Node = None,
    load_in: Annotated[
        str | None, typer.Option(metavar="8bit|nf4|fp4", help="transformers: quantize while loading.")
    ] = None,
    compute_dtype: Annotated[str, typer.Option(help="With --load-in nf4 or fp4.")] = "bfloat16",
    double_quant: Annotated[bool, typer.Option("--double-quant", help="With nf4 or fp4: scales in 8 bits.")] = False,
    drain: Annotated[int, typer.Option(min=0, help="Seconds to finish running requests.")] = 30,
    models: Models = Path("models"),
    program: Annotated[str | None, typer.Option(help="systemd: path of the runtime here.")] = None,
) -> None:  # fmt: skip
    """Write the deployment of a model server: Kustomize base and overlays, and a Helm chart of the same objects.

    Examples:

    lowbit deploy serve llama-w4 --runtime vllm --hardware l4 --autoscale keda -o deploy

    lowbit deploy serve ./model --method q4_k_m --runtime llama.cpp --cpu 16 --source claim:models/llama.gguf

    lowbit deploy serve ./model --runtime transformers --load-in nf4 --device cuda --target compose
    """
    from lowbit.api.deploy import serve_files, write
    from lowbit.api.deploy_serve import serve_spec
    from lowbit.api.deploy_wish import ServeWish

    wish = ServeWish(
        runtime=runtime, method=method, format=format, name=name, device=device, hardware=hardware, gpus=gpus, nodes=nodes,
        context=context, parallel=parallel, cpu=cpu, memory=_gib(memory), image=image, puller=puller, source=source,
        replicas=replicas, max_replicas=max_replicas,
        autoscale=_one_of("--autoscale", autoscale, ("none", "hpa", "keda")),
        route=_one_of("--route", route, ("none", "ingress", "gateway")), host=host, kserve=kserve,
        monitoring=monitoring, secret=secret, token_secret=hub_secret, node_selector=_labels(node),
        bitsandbytes=_load_in(load_in, compute_dtype, double_quant), drain=drain, extra=tuple(extra or ()),
    )  # fmt: skip
    made = serve_spec(model, wish)
    files = serve_files(made, target=target, namespace=namespace, models=str(models),
                        program=(program,) if program else ())  # fmt: skip
    folder = output or Path(f"deploy-{made.spec.name}")
    write(files, folder)
    spec = made.spec
    on = _several(spec.gpus, "GPU") if spec.gpus else f"{spec.cpu} cores"
    print(f"{folder}: {spec.model} by {made.runtime.title}, {spec.image.reference}, {on}, "
          f"{spec.memory / 2**30:.0f} GiB of memory a pod")  # fmt: skip
    _next(folder, target)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint, its config.json, or a hub id.")],
    methods: Annotated[
        str, typer.Option("--method", "--methods", help="One method; or several with commas, for an Indexed Job.")
    ] = "gptq",
    recipe: Annotated[Path | None, typer.Option(help="Recipe in YAML, instead of --method.")] = None,
    output: Output = None,
    target: Annotated[str, typer.Option(help="kubernetes (Kustomize and Helm) or compose.")] = "kubernetes",
    namespace: Namespace = "",
    name: Annotated[str | None, typer.Option(help="Name of the objects.", show_default="quantize-MODEL")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a weight.")] = None,
    group_size: Annotated[str | None, typer.Option(help="Columns that share a scale, 0 a row, or auto.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Calibration text.")] = None,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", "--calib-size", help="Calibration windows.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="As in lowbit quantize.")] = None,
    claim: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[/PATH]", help="PersistentVolumeClaim with the checkpoint.", show_default="models/NAME"
        ),
    ] = None,
    output_claim: Annotated[
        str, typer.Option(help="PersistentVolumeClaim of artifacts and journal.")
    ] = "quantized-models",
    existing_claim: Annotated[
        bool, typer.Option("--existing-claim", help="The output claim is there already: do not create it.")
    ] = False,
    storage_class: Annotated[str, typer.Option(help="StorageClass of the output claim.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of a pod, which share a run.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Pods that share one run: a JobSet, joined by torchrun.")] = 1,
    cpu: Annotated[int | None, typer.Option(min=1, help="Cores.", show_default="4 a GPU, 8 without")] = None,
    memory: Memory = None,
    image: Image = None,
    parallel: Annotated[int, typer.Option(min=1, help="Pods of a sweep at once.")] = 1,
    queue: Annotated[str, typer.Option(help="Kueue's LocalQueue; the Job waits for it.")] = "",
    hours: Annotated[int, typer.Option(min=1, help="Deadline of all tries together (with --nodes: of each try).")] = 24,
    hub_secret: Token = "",
    node: Node = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not measure the result.")] = False,
    models: Annotated[Path, typer.Option(metavar="DIR", help="compose: folder with the checkpoint here.")] = Path(
        "models"
    ),
) -> None:
    """Write the Job that quantizes a model: its recipe in a ConfigMap, claims, and a run that survives evictions.

    Examples:

    lowbit deploy quantize meta-llama/Llama-3.1-8B --method gptq --group-size 128 --hub-secret hf -o job

    lowbit deploy quantize ./model --methods gptq,awq,int8_sq,fp8 --parallel 4 --claim models/llama

    lowbit deploy quantize ./llama-70b --method gptq --nodes 2 --gpus 8 --claim models/llama-70b
    """
    from lowbit.api.deploy import quantize_files, write
    from lowbit.api.deploy_quantize import QuantizeWish, quantize_spec

    size: Any = int(group_size) if group_size is not None and group_size.isdigit() else group_size
    changes = {"bits": bits, "group_size": size, "dataset": dataset, "num_samples": num_samples, "seq_len": seq_len,
               "format": format}  # fmt: skip
    wish = QuantizeWish(
        methods=tuple(filter(None, (each.strip() for each in methods.split(",")))), recipe=recipe,
        changes={key: value for key, value in changes.items() if value is not None}, name=name, claim=claim,
        output=output_claim, create_claim=not existing_claim, storage_class=storage_class, device=device, gpus=gpus,
        nodes=nodes, cpu=cpu, memory=_gib(memory), image=image, parallel=parallel, queue=queue, token_secret=hub_secret,
        node_selector=_labels(node), deadline=hours * 3600, no_verify=no_verify,
    )  # fmt: skip
    spec = quantize_spec(model, wish)
    folder = output or Path(f"deploy-{spec.name}")
    write(quantize_files(spec, target=target, namespace=namespace, models=str(models)), folder)
    amounts = (
        f"{_several(spec.gpus, 'GPU')} and {spec.memory / 2**30:.0f} GiB of memory a pod, "
        f"{spec.output_bytes / 2**30:.0f} GiB of disk"
    )
    shared = f" on {spec.nodes} nodes" if spec.nodes > 1 else ""
    print(f"{folder}: {_several(len(spec.runs), 'run')} of {spec.model}{shared}, {amounts}")
    _next(folder, target)


app.command()(validate)
app.command()(migrate)
app.command()(plan)
app.command()(apply)
app.command()(delete)


def _next(folder: Path, target: str) -> None:
    if target == "kubernetes":
        print(f"next: read {folder}/README.md; lowbit deploy validate {folder}/kustomize/overlays/prod")
    elif target == "compose":
        print(f"next: docker compose -f {folder}/compose.yaml up")


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _gib(given: int | None) -> int | None:
    return None if given is None else given * 2**30


def _one_of(option: str, given: str, known: tuple[str, ...]) -> Any:
    if given not in known:
        raise RecipeError(f"{option} {given!r} is unknown", hint=f"one of {', '.join(known)}")
    return given


def _labels(pairs: list[str] | None) -> dict[str, str]:
    wrong = next((pair for pair in pairs or () if "=" not in pair), None)
    if wrong is not None:
        raise RecipeError(f"--node {wrong!r} is not LABEL=VALUE", hint="--node nvidia.com/gpu.product=NVIDIA-L4")
    return {pair.partition("=")[0]: pair.partition("=")[2] for pair in pairs or ()}


def _load_in(load_in: str | None, compute_dtype: str, double_quant: bool) -> Any:
    from lowbit.runtimes.bnb_variables import from_variables

    if load_in is None:
        return None
    if load_in not in ("8bit", "nf4", "fp4"):
        raise RecipeError(f"--load-in {load_in!r} is unknown", hint="8bit, nf4 or fp4")
    if load_in == "8bit":
        return from_variables({"LOAD_IN_8BIT": "true"})
    details = {"BNB_4BIT_QUANT_TYPE": load_in, "BNB_4BIT_COMPUTE_DTYPE": compute_dtype}
    return from_variables({"LOAD_IN_4BIT": "true", **details, "BNB_4BIT_USE_DOUBLE_QUANT": str(double_quant).lower()})
