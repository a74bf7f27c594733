"""Quantities: CPUs, memory, GPUs, shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowbit.deploy.documents import Document, KeyPath
from lowbit.deploy.quantity import gibibytes, parse_quantity, repaired
from lowbit.deploy.validate.finding import Change, Finding
from lowbit.deploy.validate.view import GPU, at, items, mapping, pods


def _quantities(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    places: list[KeyPath] = []
    if document.kind == "PersistentVolumeClaim":
        places.append(("spec", "resources", "requests"))
    for pod in pods(document):
        for container in pod.every_container:
            places += [(*container.path, "resources", kind) for kind in ("requests", "limits")]
        for index, volume in enumerate(items(pod.spec.get("volumes"))):
            limit = at(volume, "emptyDir", "sizeLimit")
            if limit is not None and parse_quantity(limit) is None:
                yield _quantity(document, (*pod.path, "volumes", index, "emptyDir", "sizeLimit"), limit)
    for place in places:
        for name, value in mapping(at(document.content, *place)).items():
            if parse_quantity(value) is None:
                yield _quantity(document, (*place, name), value)


def _quantity(document: Document, path: tuple[str | int, ...], value: object) -> Finding:
    meant = repaired(value)
    return Finding(
        "quantity",
        "error",
        document,
        path,
        f"{value!r} is no quantity",
        f"{meant or '32Gi, 500m, 2'}",
        (Change(path, meant),) if meant else (),
    )


def _requests(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        for container in pod.every_container:
            requests = mapping(at(container.content, "resources", "requests"))
            limits = mapping(at(container.content, "resources", "limits"))
            place = (*container.path, "resources")
            for name in {*requests, *limits}:
                asked, most = parse_quantity(requests.get(name)), parse_quantity(limits.get(name))
                if GPU.fullmatch(str(name)):
                    given = asked if most is None else most
                    if given is not None and given != int(given):
                        yield Finding(
                            "gpu-fraction",
                            "error",
                            document,
                            place,
                            f"{given:g} GPUs: only whole ones are given",
                            "1, or a MIG profile's resource",
                        )
                    if asked is not None and asked != most:
                        yield Finding(
                            "gpu-request",
                            "error",
                            document,
                            (*place, "requests", name),
                            f"{requests[name]} {name} requested and {limits.get(name, 'none')} as limit: they must be equal",
                            "the limit alone is enough",
                            (
                                Change((*place, "limits", name), max(asked, most or 0).__int__()),
                                Change((*place, "requests", name), max(asked, most or 0).__int__()),
                            ),
                        )
                elif asked is not None and most is not None and asked > most:
                    yield Finding(
                        "request-above-limit",
                        "error",
                        document,
                        (*place, "requests", name),
                        f"{name}: {requests[name]} requested, more than the limit {limits[name]}",
                        "a limit of at least the request",
                        (Change((*place, "limits", name), requests[name]),),
                    )
            if container.runtime and document.kind and "memory" not in limits:
                yield Finding(
                    "no-memory-limit",
                    "warning",
                    document,
                    place,
                    "without a memory limit the node's other pods pay for a model that is too large",
                    "requests and limits of the same memory",
                )


def _gpus(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        for container in pod.containers:
            if not document.kind or not container.runtime:
                continue
            image, place = container.image, (*container.path, "resources")
            # GPUs that come another way: a runtime class that hands out all, or a claim of Dynamic Resource Allocation
            other = pod.spec.get("runtimeClassName") or "NVIDIA_VISIBLE_DEVICES" in container.env
            other = other or at(container.content, "resources", "claims")
            if "vllm-openai" in image and "cpu" not in image and not container.gpus and not other:
                yield Finding(
                    "no-gpu",
                    "error",
                    document,
                    place,
                    "this image needs a GPU, and none is asked for",
                    "limits: nvidia.com/gpu: 1, or the image vllm/vllm-openai-cpu",
                )
            if container.runtime == "tensorrt-llm" and not container.gpus and not other:
                yield Finding(
                    "no-gpu",
                    "error",
                    document,
                    place,
                    "TensorRT-LLM needs a GPU, and none is asked for",
                    "limits: nvidia.com/gpu: 1",
                )
            split = (
                container.flag("--tensor-parallel-size", "-tp", "--tp-size", "--tp_size") or "1",
                container.flag("--pipeline-parallel-size", "-pp", "--pp-size") or "1",
            )
            nodes = container.flag("--nnodes") or "1"
            if (
                all(number.isdigit() for number in (*split, nodes))
                and container.gpus
                and "ray" not in container.line.split()
            ):
                wanted = int(split[0]) * int(split[1]) / int(nodes)
                if wanted > container.gpus:
                    yield Finding(
                        "tensor-parallel",
                        "error",
                        document,
                        place,
                        f"the model is split over {wanted:g} GPUs and the pod has {container.gpus:g}",
                        f"limits: nvidia.com/gpu: {wanted:g}, or --tensor-parallel-size {container.gpus:g}",
                    )
                elif (
                    container.runtime == "vllm"
                    and wanted < container.gpus
                    and "--data-parallel-size" not in container.flags
                ):
                    yield Finding(
                        "idle-gpu",
                        "warning",
                        document,
                        place,
                        f"the pod has {container.gpus:g} GPUs and uses {wanted:g}",
                        f"--tensor-parallel-size {container.gpus:g}, or fewer GPUs",
                    )


def _shm(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        for container in pod.containers:
            mounted = [mount for mount in container.mounts if mount.get("mountPath") == "/dev/shm"]
            limit = container.amount("limits", "memory")
            several = (container.flag("--tensor-parallel-size", "-tp", "--tp-size") or "1") not in ("1", "")
            if (
                container.runtime in ("vllm", "tensorrt-llm")
                and several
                and not mounted
                and not pod.spec.get("hostIPC")
            ):
                yield Finding(
                    "no-shm",
                    "error",
                    document,
                    container.path,
                    "GPUs that share a model talk through /dev/shm, which has 64 MiB in a container",
                    "an emptyDir with medium: Memory and a sizeLimit at /dev/shm",
                )
            for mount in mounted:
                folder = mapping(pod.volume(str(mount.get("name"))).get("emptyDir"))
                index = next(
                    (
                        i
                        for i, volume in enumerate(items(pod.spec.get("volumes")))
                        if volume.get("name") == mount.get("name")
                    ),
                    0,
                )
                place = (*pod.path, "volumes", index, "emptyDir")
                if folder.get("medium") != "Memory":
                    yield Finding(
                        "shm-on-disk",
                        "error",
                        document,
                        place,
                        "/dev/shm is on a disk",
                        "medium: Memory",
                        (Change((*place, "medium"), "Memory"),),
                    )
                elif folder.get("sizeLimit") is None:
                    yield Finding(
                        "shm-unlimited",
                        "warning",
                        document,
                        place,
                        "/dev/shm may take half of the node's memory, and counts into this container's limit",
                        "sizeLimit: 2Gi a GPU",
                    )
                elif limit is not None and (container.shm or 0) >= limit:
                    memory = (*container.path, "resources", "limits", "memory")
                    yield Finding(
                        "shm-above-limit",
                        "error",
                        document,
                        memory,
                        "/dev/shm counts into the memory limit, and is not smaller than it",
                        f"a limit above {gibibytes(container.shm or 0)}",
                    )


def _threads(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        for container in pod.containers:
            limit, asked = container.amount("limits", "cpu"), container.amount("requests", "cpu")
            given = container.flag("--threads", "-t") if container.runtime in ("llama.cpp", "transformers") else None
            name = "--threads" if "--threads" in container.flags else "-t"
            place = container.place(name)
            if given is None and "OMP_NUM_THREADS" in container.env:
                number, entry = container.env["OMP_NUM_THREADS"]
                given, name, place = str(entry.get("value")), "OMP_NUM_THREADS", (*container.path, "env", number)
            if given is None or not given.isdigit():
                if container.runtime == "llama.cpp" and not container.gpus and limit and not given:
                    yield Finding(
                        "threads-unset",
                        "warning",
                        document,
                        container.path,
                        "without --threads llama.cpp starts one for each core of the node, not of the pod",
                        f"--threads {int(limit)}",
                    )
                continue
            if limit is not None and int(given) > limit:
                yield Finding(
                    "threads",
                    "error",
                    document,
                    place,
                    f"{name} {given} on {limit:g} CPUs: threads wait for one another, and it gets slower, not faster",
                    f"{name} {int(limit)}",
                )
            elif asked is not None and int(given) > asked:
                cpu = (*container.path, "resources", "requests", "cpu")
                yield Finding(
                    "threads",
                    "warning",
                    document,
                    place,
                    f"{name} {given} and {asked:g} CPUs requested: on a busy node threads wait for one another",
                    f"request cpu {given}",
                    (Change(cpu, given),) if limit is None or limit >= int(given) else (),
                )


RULES = (_quantities, _requests, _gpus, _shm, _threads)
