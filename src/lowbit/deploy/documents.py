"""Manifests as they lie on disk: files, folders, Kustomize trees, Markdown with YAML in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lowbit.core.errors import RecipeError
from lowbit.deploy.template import Objects

_FENCE = re.compile(r"^```(?:ya?ml|python)?[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_KUSTOMIZATION = ("kustomization.yaml", "kustomization.yml")
_PLAIN = {"apiVersion", "kind", "namespace", "resources", "patches"}
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """One YAML document. place: file and number. lines: path -> line in the file. content: what it holds, a mapping."""

    file: Path
    number: int
    content: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict, compare=False)

    @property
    def place(self) -> tuple[str, int]:
        """Which document it is."""
        return str(self.file), self.number

    @property
    def kind(self) -> str:
        """ "Deployment"; "" for a fragment."""
        return str(self.content.get("kind") or "")

    @property
    def name(self) -> str:
        """Of the object, "" without one."""
        metadata = self.content.get("metadata")
        return str(metadata.get("name") or "") if isinstance(metadata, dict) else ""

    def line(self, path: KeyPath) -> int:
        """Of the nearest entry that is there."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """All documents of files and folders. Raises RecipeError for what is missing or no YAML."""
    found = [document for path in paths for document in _read(path)]
    if not found:
        raise RecipeError(
            f"{', '.join(map(str, paths))}: no manifest is there", hint="YAML files, or a Kustomize folder"
        )
    return found


def read_objects(paths: Sequence[Path]) -> Objects:
    """Their contents, those that are objects of Kubernetes."""
    return [document.content for document in read_documents(paths) if document.kind]


def _read(path: Path) -> Iterator[Document]:
    if not path.exists():
        raise RecipeError(f"{path} does not exist", hint="YAML files, or a Kustomize folder")
    if path.is_dir():
        yield from _folder(path)
    elif path.suffix == ".md":
        text = path.read_text()
        number = 0
        for match in _FENCE.finditer(text):
            skipped = text[: match.start(1)].count("\n")
            for document in _parse(path, match[1], skipped, number):
                number += 1
                if {"kind", "env"} & document.content.keys():
                    yield document
    else:
        yield from _parse(path, path.read_text(), 0, 0)


def _folder(folder: Path) -> Iterator[Document]:
    if any((folder / name).is_file() for name in _KUSTOMIZATION):
        yield from _kustomized(folder)
        return
    if (folder / "Chart.yaml").is_file():
        yield from _charted(folder)
        return
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _folder(entry)
        elif entry.suffix in (".yaml", ".yml") and entry.name not in ("compose.yaml", "docker-compose.yaml"):
            yield from _parse(entry, entry.read_text(), 0, 0)


def _kustomized(folder: Path) -> Iterator[Document]:
    """Resources, patches of RFC 6902 and the namespace; anything more is left to kubectl."""
    file = next(folder / name for name in _KUSTOMIZATION if (folder / name).is_file())
    content = yaml.safe_load(file.read_text()) or {}
    patches = content.get("patches") or []
    plain = all(isinstance(p.get("patch"), str) and isinstance(yaml.safe_load(p["patch"]), list) for p in patches)
    if not content.keys() <= _PLAIN or not plain or any("//" in str(each) for each in content.get("resources") or ()):
        yield from _parse(file, _run(["kubectl", "kustomize", str(folder)], folder), 0, 0)
        return
    for resource in content.get("resources") or ():
        for document in _read((folder / resource).resolve()):
            made = deepcopy(document.content)
            for patch in patches:
                target = patch.get("target") or {}
                if target.get("kind") in (None, document.kind) and target.get("name") in (None, document.name):
                    for operation in yaml.safe_load(patch["patch"]):
                        _patch(made, operation)
            if content.get("namespace"):
                made["metadata"] = {**made["metadata"], "namespace": content["namespace"]}
            yield Document(document.file, document.number, made, document.lines)


def _charted(folder: Path) -> Iterator[Document]:
    name = str((yaml.safe_load((folder / "Chart.yaml").read_text()) or {}).get("name") or "release")
    yield from _parse(folder / "Chart.yaml", _run(["helm", "template", name, str(folder)], folder), 0, 0)


def _run(command: list[str], folder: Path) -> str:
    if shutil.which(command[0]) is None:
        raise RecipeError(f"{folder} has to be rendered by {command[0]}, which is not installed",
                          hint=f"{' '.join(command)} > all.yaml elsewhere, then give that file")  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended"])[-1]
        raise RecipeError(f"{command[0]} cannot render {folder}: {reason}", hint=" ".join(command))
    return done.stdout


def _patch(content: dict[str, Any], operation: dict[str, Any]) -> None:
    *above, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = content
    for part in above:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if operation["op"] == "remove":
        del place[last]
    else:
        place[last] = operation["value"]


def _parse(file: Path, text: str, skipped: int, number: int) -> Iterator[Document]:
    try:
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        contents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        if file.suffix == ".md":
            return
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1 + skipped}" if mark else ""
        raise RecipeError(f"{file} is no YAML{where}: {getattr(error, 'problem', None) or error}",
                          hint="Helm templates have to be rendered first: helm template DIR") from error  # fmt: skip
    for offset, (node, content) in enumerate(zip(nodes, contents, strict=True)):
        if isinstance(content, dict):
            lines: dict[KeyPath, int] = {}
            _lines(node, (), skipped, lines)
            yield Document(file, number + offset, content, lines)


def _lines(node: Any, path: KeyPath, skipped: int, found: dict[KeyPath, int]) -> None:
    found.setdefault(path, node.start_mark.line + 1 + skipped)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found[(*path, key.value)] = key.start_mark.line + 1 + skipped
            _lines(value, (*path, key.value), skipped, found)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _lines(item, (*path, index), skipped, found)
