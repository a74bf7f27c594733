"""Pods and containers of any document, and what a container's words mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lowbit.deploy.documents import Document, KeyPath
from lowbit.deploy.quantity import parse_quantity

GPU = re.compile(r"(nvidia\.com/(gpu|mig-.*)|amd\.com/gpu|gpu\.intel\.com/.*)")
_TEMPLATES: dict[str, tuple[KeyPath, ...]] = {
    "Pod": ((),),
    "Deployment": (("spec", "template"),),
    "StatefulSet": (("spec", "template"),),
    "DaemonSet": (("spec", "template"),),
    "ReplicaSet": (("spec", "template"),),
    "LeaderWorkerSet": (
        ("spec", "leaderWorkerTemplate", "leaderTemplate"),
        ("spec", "leaderWorkerTemplate", "workerTemplate"),
    ),
}


def at(content: Any, *path: str | int) -> Any:
    """The entry at a path, None where there is none."""
    for part in path:
        if isinstance(content, Mapping):
            content = content.get(part)
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            content = content[part]
        else:
            return None
    return content


def mapping(value: Any) -> dict[str, Any]:
    """The value, if it is a mapping."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[dict[str, Any]]:
    """The value, if it is a list, its mappings in their places (others as empty ones)."""
    return [mapping(item) for item in value] if isinstance(value, list) else []


@dataclass(frozen=True)
class Pod:
    """A pod, or a template of pods. path: of its spec."""

    document: Document
    path: KeyPath
    spec: dict[str, Any]
    metadata: dict[str, Any]

    @property
    def containers(self) -> list[Container]:
        """Without init containers."""
        if not self.document.kind:
            return [Container(self, (), self.document.content)]
        return [
            Container(self, (*self.path, "containers", index), item)
            for index, item in enumerate(items(self.spec.get("containers")))
        ]

    @property
    def every_container(self) -> list[Container]:
        """With them."""
        return self.containers + [
            Container(self, (*self.path, "initContainers", index), item)
            for index, item in enumerate(items(self.spec.get("initContainers")))
        ]

    @property
    def labels(self) -> dict[str, Any]:
        """Of the pods."""
        return mapping(self.metadata.get("labels"))

    def volume(self, name: str) -> dict[str, Any]:
        """By name, {} without one."""
        return next((v for v in items(self.spec.get("volumes")) if v.get("name") == name), {})


def jobs(document: Document) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Path and specification of every Job that a document describes: itself, or those that it makes."""
    paths: dict[str, list[KeyPath]] = {"Job": [("spec",)], "CronJob": [("spec", "jobTemplate", "spec")]}
    groups = at(document.content, "spec", "replicatedJobs") if document.kind == "JobSet" else None
    made: list[KeyPath] = [("spec", "replicatedJobs", index, "template", "spec") for index in range(len(items(groups)))]
    for path in paths.get(document.kind, made):
        found = at(document.content, *path)
        if isinstance(found, dict):
            yield path, found


def pods(document: Document) -> Iterator[Pod]:
    """All pods that a document describes; a fragment with `env` counts as one container."""
    if not document.kind and isinstance(document.content.get("env"), list):
        yield Pod(document, (), {"containers": [document.content]}, {})
    if document.kind == "LLMInferenceService":
        spec = mapping(at(document.content, "spec", "template"))
        if spec:
            yield Pod(document, ("spec", "template"), spec, {})
    for path in (*_TEMPLATES.get(document.kind, ()), *((*path, "template") for path, _ in jobs(document))):
        template = at(document.content, *path)
        if isinstance(template, dict):
            yield Pod(document, (*path, "spec"), mapping(template.get("spec")), mapping(template.get("metadata")))


@dataclass(frozen=True)
class Container:
    """A container and where it is."""

    pod: Pod
    path: KeyPath
    content: dict[str, Any]

    @property
    def document(self) -> Document:
        """That it is in."""
        return self.pod.document

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.content.get("name") or "")

    @property
    def image(self) -> str:
        """Its image."""
        return str(self.content.get("image") or "")

    @cached_property
    def words(self) -> list[tuple[KeyPath, str]]:
        """Words of command and arguments; scripts of `sh -c` are taken apart."""
        found = []
        for key in ("command", "args"):
            for index, word in enumerate(self.content.get(key) or ()):
                place = (*self.path, key, index)
                parts = str(word).split() if re.search(r"\s", str(word)) else [str(word)]
                found += [(place, part) for part in parts]
        return found

    @cached_property
    def flags(self) -> dict[str, tuple[KeyPath, str]]:
        """ "--flag" -> (place of the flag, value); "" for one without a value. "_" and "-" are alike in names."""
        found = {}
        for index, (place, word) in enumerate(self.words):
            if not re.match(r"--?[a-zA-Z]", word):
                continue
            name, equals, value = word.partition("=")
            following = self.words[index + 1][1] if index + 1 < len(self.words) else ""
            if not equals and not re.match(r"--?[a-zA-Z]", following):
                value = following
            found[name.replace("_", "-")] = (place, value)
        return found

    def flag(self, *names: str) -> str | None:
        """Value of the first of these flags that is given."""
        return next((self.flags[name][1] for name in names if name in self.flags), None)

    def place(self, name: str) -> KeyPath:
        """Of a flag."""
        return self.flags[name][0] if name in self.flags else self.path

    @property
    def line(self) -> str:
        """The command line."""
        return " ".join(word for _, word in self.words)

    @property
    def env(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """Name -> number and entry."""
        return {str(entry.get("name")): (index, entry) for index, entry in enumerate(items(self.content.get("env")))}

    def amount(self, kind: str, resource: str) -> float | None:
        """Of "requests" or "limits", as a number."""
        value = at(self.content, "resources", kind, resource)
        return None if value is None else parse_quantity(value)

    @property
    def gpus(self) -> float:
        """GPUs of its limits (else of its requests)."""
        for kind in ("limits", "requests"):
            named = mapping(at(self.content, "resources", kind))
            counted = [parse_quantity(value) or 0 for key, value in named.items() if GPU.fullmatch(str(key))]
            if counted:
                return sum(counted)
        return 0

    @property
    def runtime(self) -> str:
        """ "vllm", "llama.cpp", "tensorrt-llm", "transformers", or "" for something else."""
        text = f"{self.image} {self.line}"
        if self.content.get("command") and not re.search(
            r"vllm|llama|trtllm|transformers|python|bash|/sh|^sh ", self.line
        ):
            return ""  # another program of a runtime's image
        if self.name == "pull" or re.search(r"\bhf download\b|lowbit\.deploy\.job_entry", self.line):
            return ""
        if "lowbit.runtimes.transformers_server" in text or re.search(r"\btransformers serve\b", text):
            return "transformers"
        if re.search(r"vllm[^ ]*openai|/vllm[-/:]|\bvllm serve\b|vllm\.entrypoints", text):
            return "vllm"
        if re.search(r"llama\.cpp|llama-server", text):
            return "llama.cpp"
        if re.search(r"trtllm-serve|tensorrt-llm/release", text):
            return "tensorrt-llm"
        return ""

    @property
    def model(self) -> str:
        """What it serves, as it is named: path or hub id."""
        given = self.flag("--model", "-m", "--model-path")
        if given:
            return given
        words = [word for _, word in self.words]
        after = words.index("serve") + 1 if "serve" in words else 0
        return words[after] if after and after < len(words) and not words[after].startswith("-") else ""

    @property
    def mounts(self) -> list[dict[str, Any]]:
        """Its volume mounts."""
        return items(self.content.get("volumeMounts"))

    @property
    def shm(self) -> float | None:
        """Bytes of its memory-backed /dev/shm; None without one."""
        for mount in self.mounts:
            if mount.get("mountPath") == "/dev/shm":
                folder = mapping(self.pod.volume(str(mount.get("name"))).get("emptyDir"))
                return parse_quantity(folder.get("sizeLimit")) or 0.0 if folder.get("medium") == "Memory" else None
        return None


def claims_of_one_node(pod: Pod, documents: Sequence[Document]) -> Iterator[tuple[KeyPath, str, str]]:
    """Volumes of a pod that pods on one node alone can have: (place, name of the claim, its access mode)."""
    modes = {
        each.name: at(each.content, "spec", "accessModes") for each in documents if each.kind == "PersistentVolumeClaim"
    }
    for index, volume in enumerate(items(pod.spec.get("volumes"))):
        claim = at(volume, "persistentVolumeClaim", "claimName")
        if modes.get(claim) in (["ReadWriteOnce"], ["ReadWriteOncePod"]):
            yield (*pod.path, "volumes", index), claim, modes[claim][0]
