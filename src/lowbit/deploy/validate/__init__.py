"""A validator of model-serving manifests, anyone's: what schemas miss, and what only this field knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lowbit.deploy.documents import Document
from lowbit.deploy.validate import (
    fields,
    groups,
    jobs,
    objects,
    pods,
    probes,
    quantizers,
    resources,
    servers,
    sizes,
    types,
)
from lowbit.deploy.validate.finding import Finding

Rule = Callable[[Document, Sequence[Document]], Iterator[Finding]]
RULES: tuple[Rule, ...] = (
    *fields.RULES,
    *types.RULES,
    *objects.RULES,
    *pods.RULES,
    *resources.RULES,
    *probes.RULES,
    *jobs.RULES,
    *groups.RULES,
    *servers.RULES,
    *sizes.RULES,
    *quantizers.RULES,
)


def validate(documents: Sequence[Document], version: str | None = None) -> list[Finding]:
    """Every finding, in the order of the files. version: of Kubernetes, whose schema is used as well where the package
    kubernetes-validate is installed ("1.37"; None: the newest it has)."""
    from lowbit.deploy.validate.schema import schema_findings

    found = [finding for document in documents for rule in RULES for finding in rule(document, documents)]
    known = {(finding.document.place, finding.path) for finding in found}
    # what the schema says of a field that a rule of ours speaks of already is said once
    told = [
        finding
        for finding in schema_findings(documents, version)
        if not any(
            place == finding.document.place
            and (path[: len(finding.path)] == finding.path or finding.path[: len(path)] == path)
            for place, path in known
        )
    ]
    order = {document.place: index for index, document in enumerate(documents)}
    return sorted([*found, *told], key=lambda finding: (order[finding.document.place], finding.line))
