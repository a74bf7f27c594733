"""Kubernetes' own schema, where the package kubernetes-validate is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lowbit.deploy.documents import Document, KeyPath
from lowbit.deploy.validate.finding import Finding


def schema_findings(documents: Sequence[Document], version: str | None) -> Iterator[Finding]:
    """What the schema of a version (None: the newest) says of objects of Kubernetes itself; kinds of others are left out."""
    try:
        import kubernetes_validate as schemas
    except ImportError:
        return
    chosen = version or schemas.latest_version()
    for document in documents:
        if not document.kind or "." in str(document.content.get("apiVersion")).partition("/")[0].replace(".k8s.io", ""):
            continue
        try:
            schemas.validate(document.content, chosen, strict=True)
        except schemas.ValidationError as error:
            path: KeyPath = tuple(error.path)
            yield Finding(
                "schema",
                "error",
                document,
                path,
                f"Kubernetes {chosen}: {_short(str(error.message))}",
                "kubectl explain " + ".".join([document.kind.lower(), *(str(p) for p in path if isinstance(p, str))]),
            )
        except schemas.SchemaNotFoundError:
            yield Finding(
                "schema",
                "error",
                document,
                ("apiVersion",),
                f"Kubernetes {chosen} has no {document.content.get('apiVersion')} {document.kind}",
                "kubectl api-resources",
            )


def _short(text: str) -> str:
    return re.sub(r"\s+", " ", text)[:240]
