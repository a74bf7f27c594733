"""Inside a pod: volumes, mounts, variables, images, security, endings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from lowbit.deploy.documents import Document
from lowbit.deploy.validate.finding import Change, Finding
from lowbit.deploy.validate.view import at, items, mapping, pods

_SECRETS = re.compile(
    r"(VLLM|LLAMA|LOWBIT|OPENAI)_API_KEY|HF_TOKEN|HUGGING_FACE_HUB_TOKEN|.*_(PASSWORD|SECRET_ACCESS_KEY)"
)


def _volumes(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        names = {volume.get("name") for volume in items(pod.spec.get("volumes"))}
        if document.kind == "StatefulSet":
            claims = items(at(document.content, "spec", "volumeClaimTemplates"))
            names |= {at(claim, "metadata", "name") for claim in claims}
        for container in pod.every_container:
            for index, mount in enumerate(container.mounts):
                # a fragment, and KServe's template, get their volumes elsewhere
                if mount.get("name") not in names and document.kind not in ("", "LLMInferenceService"):
                    yield Finding(
                        "dangling-mount",
                        "error",
                        document,
                        (*container.path, "volumeMounts", index),
                        f"there is no volume named {mount.get('name')!r}",
                        _known("volumes", names),
                    )
            twice = [p for p, count in Counter(str(m.get("mountPath")) for m in container.mounts).items() if count > 1]
            for path in twice:
                yield Finding(
                    "mount-twice",
                    "error",
                    document,
                    (*container.path, "volumeMounts"),
                    f"{path} is mounted twice",
                    "one mount for a path",
                )
        for index, volume in enumerate(items(pod.spec.get("volumes"))):
            sources = sorted(key for key in volume if key != "name")
            if len(sources) > 1:
                yield Finding(
                    "volume-sources",
                    "error",
                    document,
                    (*pod.path, "volumes", index),
                    f"volume {volume.get('name')!r} has {len(sources)} sources: {', '.join(sources)}",
                    "keep one",
                )


def _known(what: str, names: set[object]) -> str:
    listed = sorted(str(name) for name in names if name)
    return f"{what} here: {', '.join(listed)}" if listed else f"add it to {what}"


def _twice(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        lists = {
            ("containers", pod.path): [container.name for container in pod.containers],
            ("volumes", pod.path): [str(v.get("name")) for v in items(pod.spec.get("volumes"))],
        }
        for container in pod.every_container:
            lists["env", container.path] = [str(entry.get("name")) for entry in items(container.content.get("env"))]
        for (key, path), names in lists.items():
            for name in (name for name, count in Counter(names).items() if count > 1):
                yield Finding(
                    "named-twice",
                    "error",
                    document,
                    (*path, key),
                    f"{name!r} is there twice in {key}",
                    "keep one; of variables the last one counts",
                )


def _secrets(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        for container in pod.every_container:
            for name, (index, entry) in container.env.items():
                if _SECRETS.fullmatch(name) and entry.get("value"):
                    yield Finding(
                        "secret-in-plain",
                        "error",
                        document,
                        (*container.path, "env", index, "value"),
                        f"{name} stands in the manifest, where everyone who may read it sees it",
                        "valueFrom.secretKeyRef, and a new key: this one is known",
                    )
            if (container.flag("--api-key") or "").strip("\"'") and "$(" not in str(container.flag("--api-key")):
                yield Finding(
                    "secret-in-plain",
                    "error",
                    document,
                    container.place("--api-key"),
                    "--api-key stands in the manifest and in the process list",
                    "the runtime's variable (VLLM_API_KEY, LLAMA_API_KEY) from a Secret",
                )


def _images(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        for container in pod.every_container:
            image, place = container.image, (*container.path, "image")
            name, _, tag = image.partition("@")[0].rpartition("/")[2].partition(":")
            if image and "@" not in image and (tag in ("", "latest") or name == "") and "{" not in image:
                yield Finding(
                    "image-unpinned",
                    "warning",
                    document,
                    place,
                    f"{image} is whatever is newest when a pod starts: two pods can differ",
                    "a release's tag, best with its digest",
                )
            elif re.search(r"ggml-org/llama\.cpp:server(-cuda|-vulkan|-rocm|-intel)?$", image):
                yield Finding(
                    "image-unpinned",
                    "warning",
                    document,
                    place,
                    f"{image} is built anew every day",
                    "a build's tag: server-b11176",
                )
            if "ghcr.io/ggerganov/" in image:
                yield Finding(
                    "image-dead",
                    "error",
                    document,
                    place,
                    "llama.cpp moved to the organization ggml-org; images under ggerganov are no longer built",
                    "ghcr.io/ggml-org/llama.cpp:server-bNNNN",
                    (Change(place, image.replace("ghcr.io/ggerganov/", "ghcr.io/ggml-org/")),),
                )
            if re.search(r"(ghcr\.io/)?abetlen/llama-cpp-python|ghcr\.io/predibase/lorax|ghcr\.io/mlc-ai/", image):
                yield Finding(
                    "image-dead", "warning", document, place, f"{image} is hardly kept any more", "llama.cpp or vLLM"
                )


def _security(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        if not document.kind:
            continue
        above = mapping(pod.spec.get("securityContext"))
        for container in pod.every_container:
            own = mapping(container.content.get("securityContext"))
            user = own.get("runAsUser", above.get("runAsUser"))
            place = (*container.path, "securityContext")
            if own.get("privileged") is True:
                yield Finding(
                    "privileged",
                    "warning",
                    document,
                    place,
                    "a model server needs no privileges",
                    "privileged: false; GPUs come by resource limits",
                    (Change((*place, "privileged"), False),),
                )
            if own.get("runAsNonRoot", above.get("runAsNonRoot")) is True and user == 0:
                yield Finding(
                    "root",
                    "error",
                    document,
                    place,
                    "runAsNonRoot and runAsUser 0: the pod never starts",
                    "runAsUser of 1000 or more",
                )
            if own.get("readOnlyRootFilesystem") is True and container.runtime in (
                "vllm",
                "transformers",
                "tensorrt-llm",
            ):
                paths = [str(mount.get("mountPath")) for mount in container.mounts if not mount.get("readOnly")]
                home = str(at(container.env.get("HOME", (0, {}))[1], "value") or "")
                for folder in (home, "/tmp"):
                    if not any(folder == path or folder.startswith(path.rstrip("/") + "/") for path in paths if folder):
                        what = folder or "HOME"
                        yield Finding(
                            "read-only-home",
                            "error",
                            document,
                            place,
                            f"the root is read-only and {what} is not writable, where {container.runtime} keeps caches",
                            "an emptyDir there, and HOME set to it",
                        )


def _ending(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        for container in pod.containers:
            sleep = at(container.content, "lifecycle", "preStop", "sleep", "seconds")
            script = " ".join(map(str, at(container.content, "lifecycle", "preStop", "exec", "command") or ()))
            found = re.search(r"sleep (\d+)", script)
            seconds = sleep if isinstance(sleep, int) else int(found[1]) if found else 0
            if isinstance(grace, int) and seconds >= grace:
                place = (*pod.path, "terminationGracePeriodSeconds")
                yield Finding(
                    "grace",
                    "error",
                    document,
                    place,
                    f"preStop takes {seconds} s of {grace} s, so requests are cut off",
                    "preStop, then the time to finish a request, and some seconds",
                    (Change(place, seconds + 45),),
                )


def _writable_model(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        for container in pod.containers:
            if not container.runtime:
                continue
            for index, mount in enumerate(container.mounts):
                volume = pod.volume(str(mount.get("name")))
                claim = mapping(volume.get("persistentVolumeClaim"))
                if claim and mount.get("readOnly") is not True and claim.get("readOnly") is not True:
                    place = (*container.path, "volumeMounts", index)
                    yield Finding(
                        "writable-model",
                        "warning",
                        document,
                        place,
                        "a server can write to the volume with the model, and pods on other nodes may be kept out",
                        "readOnly: true",
                        (Change((*place, "readOnly"), True),),
                    )


RULES = (_volumes, _twice, _secrets, _images, _security, _ending, _writable_model)
