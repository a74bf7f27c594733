"""A Kustomize base and overlays: the base is what all have in common, an overlay adds objects and patches the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.deploy.outputs.comments import commented
from lowbit.deploy.outputs.files import to_yaml
from lowbit.deploy.template import Objects, Template, resolve

_API = "kustomize.config.k8s.io/v1beta1"


def tree(
    templates: Sequence[Template], *, name: str, namespace: str, profiles: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Files below kustomize/: base/, and overlays/PROFILE/ for each of `profiles` (values that it sets)."""
    made = {profile: _named(templates, name, values) for profile, values in profiles.items()}
    first = next(iter(made))
    common = [file for file in made[first] if all(file in objects for objects in made.values())]
    files = {f"base/{file}": commented(to_yaml(made[first][file])) for file in common}
    files["base/kustomization.yaml"] = _kustomization(common, "")
    for profile, objects in made.items():
        folder = f"overlays/{profile}"
        own = [file for file in objects if file not in common]
        patches = []
        for file in common:
            changes = difference(made[first][file], objects[file])
            if changes:
                target = {"kind": objects[file]["kind"], "name": objects[file]["metadata"]["name"]}
                patches.append({"target": target, "patch": to_yaml(changes)})
        files |= {f"{folder}/{file}": commented(to_yaml(objects[file])) for file in own}
        files[f"{folder}/kustomization.yaml"] = _kustomization(["../../base", *own], namespace, patches)
    return files


def _named(templates: Sequence[Template], name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    wanted = [template for template in templates if template.when is None or values.get(*template.when)]
    return {template.file: resolve(template.tree, name, values) for template in wanted}


def _kustomization(resources: list[str], namespace: str, patches: Objects | None = None) -> str:
    content: dict[str, Any] = {"apiVersion": _API, "kind": "Kustomization"}
    if namespace:
        content["namespace"] = namespace
    content["resources"] = resources
    if patches:
        content["patches"] = patches
    return to_yaml(content)


def difference(before: Any, after: Any, path: str = "") -> Objects:
    """Operations of RFC 6902 that make `after` of `before`; a list that differs is replaced whole."""
    if before == after:
        return []
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [{"op": "replace", "path": path, "value": after}]
    found: Objects = []
    for key in before:
        place = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
        if key not in after:
            found.append({"op": "remove", "path": place})
        else:
            found += difference(before[key], after[key], place)
    for key in after:
        if key not in before:
            place = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            found.append({"op": "add", "path": place, "value": after[key]})
    return found
