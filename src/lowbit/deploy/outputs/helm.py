"""A Helm chart: the tree's knobs become `{{ .Values... }}`, its switches `{{ if }}`, and values.schema.json types them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lowbit.deploy.outputs.comments import commented
from lowbit.deploy.outputs.files import to_yaml
from lowbit.deploy.template import Release, Template, Text, Tree, Value, When, leaves


def chart(
    templates: Sequence[Template],
    *,
    name: str,
    description: str,
    version: str,
    profiles: Mapping[str, Mapping[str, Any]],
) -> dict[str, str]:
    """Files of a chart called `name`. profiles: name -> values that values-NAME.yaml sets."""
    values, schema = _values(templates)
    files = {
        "Chart.yaml": to_yaml({"apiVersion": "v2", "name": name, "description": description, "type": "application",
                               "version": version, "appVersion": version}),
        "values.yaml": to_yaml(values),
        "values.schema.json": json.dumps(schema, indent=2) + "\n",
    }  # fmt: skip
    for profile, changes in profiles.items():
        known = {leaf.path for template in templates for leaf in leaves(template.tree)}
        known |= {template.when[0] for template in templates if template.when}
        tree: dict[str, Any] = {}
        for path, value in changes.items():
            if path in known:
                _put(tree, path, value)
        files[f"values-{profile}.yaml"] = to_yaml(tree)
    for template in templates:
        text = "\n".join(_lines(template.tree, 0)) + "\n"
        if template.when is not None:
            text = f"{{{{- if .Values.{template.when[0]} }}}}\n{text}{{{{- end }}}}\n"
        files[f"templates/{template.file}"] = commented(text)
    return files


def _values(templates: Sequence[Template]) -> tuple[dict[str, Any], dict[str, Any]]:
    values: dict[str, Any] = {}
    schema: dict[str, Any] = {"$schema": "http://json-schema.org/draft-07/schema#", **_object()}
    found: dict[str, tuple[Any, str]] = {}
    for template in templates:
        if template.when is not None:
            found.setdefault(template.when[0], (template.when[1], "Whether it is there."))
        for leaf in leaves(template.tree):
            before = found.get(leaf.path, (None, ""))
            text = leaf.text or before[1]
            found[leaf.path] = (leaf.default, text)
    for path, (default, text) in sorted(found.items()):
        _put(values, path, default)
        _describe(schema, path.split("."), default, text)
    # what Helm itself hands to every chart
    schema["properties"]["global"] = {"type": "object"}
    return values, schema


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for part in above:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _object() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _describe(schema: dict[str, Any], parts: list[str], default: Any, text: str) -> None:
    for part in parts[:-1]:
        schema = schema["properties"].setdefault(part, _object())
    schema["properties"][parts[-1]] = _type(".".join(parts), default) | ({"description": text} if text else {})


_NOT_LATEST = {"not": {"const": "latest"}, "minLength": 1}
_MORE: dict[str, dict[str, Any]] = {
    "image.tag": _NOT_LATEST,
    "puller.tag": _NOT_LATEST,
    # --set makes numbers of them
    "resources.cpu": {"type": ["string", "integer"]},
    "resources.gpus": {"type": ["string", "integer"]},
    "autoscaling.threshold": {"type": ["string", "integer"]},
    "resources.memory": {"pattern": r"^\d+(\.\d+)?[KMGT]i?$"},
}


def _type(path: str, default: Any) -> dict[str, Any]:
    if path == "image.pullPolicy":
        return {"type": "string", "enum": ["Always", "IfNotPresent", "Never"]}
    if isinstance(default, bool):
        return {"type": "boolean"}
    if isinstance(default, int):
        return {"type": "integer", "minimum": 0}
    if isinstance(default, list):
        return {"type": "array", "items": {"type": "object"}}
    if isinstance(default, dict):
        return {"type": "object", "additionalProperties": {"type": "string"}}
    return {"type": "string", **_MORE.get(path, {})}


def _lines(tree: Tree, indent: int) -> list[str]:
    """A block of YAML, indented."""
    space = " " * indent
    lines = []
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            inner, condition = _opened(value)
            lines += [line for line in (condition,) if line]
            lines += _entry(f"{space}{_scalar(key)}:", inner, indent + 2)
            lines += ["{{- end }}"] if condition else []
    else:
        for item in tree:
            inner, condition = _opened(item)
            lines += [line for line in (condition,) if line]
            lines += _item(inner, indent)
            lines += ["{{- end }}"] if condition else []
    return lines


def _opened(value: Tree) -> tuple[Tree, str]:
    if not isinstance(value, When):
        return value, ""
    return value.then, f"{{{{- if {'not ' if value.negate else ''}.Values.{value.path} }}}}"


def _entry(head: str, value: Tree, indent: int) -> list[str]:
    if isinstance(value, Value) and isinstance(value.default, list | dict):
        inside = f"{' ' * indent}{{{{- toYaml . | nindent {indent} }}}}"
        return [f"{{{{- with .Values.{value.path} }}}}", head, inside, "{{- end }}"]
    if isinstance(value, Mapping | list | tuple):
        block = _lines(value, indent)
        return [head, *block] if block else [f"{head} {'{}' if isinstance(value, Mapping) else '[]'}"]
    if isinstance(value, str) and "\n" in value:
        # the text is data: what looks like a template in it must stay as it is
        return [f"{head} |", *(f"{' ' * indent}{line}".rstrip() for line in _literal(value).splitlines())]
    return [f"{head} {_scalar(value)}"]


def _item(value: Tree, indent: int) -> list[str]:
    space = " " * indent
    if isinstance(value, Mapping) and value:
        first, *rest = _lines(value, indent + 2)
        return [f"{space}- {first.lstrip()}", *rest]
    return _entry(f"{space}-", value, indent + 2)


def _scalar(value: Tree) -> str:
    if isinstance(value, Value):
        quote = "" if isinstance(value.default, bool | int) else " | quote"
        return f"{{{{ .Values.{value.path}{quote} }}}}"
    if isinstance(value, Release):
        return f"{{{{ .Release.Name }}}}{value.suffix}"
    if isinstance(value, Text):
        return "'" + "".join(_part(part) for part in value.parts) + "'"
    return _literal(yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("\n...\n").strip())


def _part(part: str | Value | Release) -> str:
    if isinstance(part, str):
        return _literal(part.replace("'", "''"))
    return _scalar(part) if isinstance(part, Release) else f"{{{{ .Values.{part.path} }}}}"


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}') if "{{" in text else text
