"""`--fix`: the mechanical mends, written back."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from lowbit.core.errors import OutputError
from lowbit.deploy.documents import Document
from lowbit.deploy.outputs.files import to_yaml
from lowbit.deploy.validate.finding import Finding, apply_change, swept


def fixed(documents: Sequence[Document], findings: Sequence[Finding]) -> list[Document]:
    """The documents with all changes made; of two changes of one place the first counts."""
    made = []
    for document in documents:
        content = deepcopy(document.content)
        seen = set()
        for finding in findings:
            if finding.document.place != document.place:
                continue
            for change in finding.changes:
                if change.path not in seen:
                    seen.add(change.path)
                    apply_change(content, change)
        made.append(Document(document.file, document.number, swept(content), document.lines))
    return made


def write_back(documents: Sequence[Document]) -> list[Path]:
    """Write documents into their files. Raises OutputError for what is no plain YAML file."""
    files: dict[Path, list[Document]] = {}
    for document in documents:
        files.setdefault(document.file, []).append(document)
    for file, listed in files.items():
        if file.suffix not in (".yaml", ".yml") or file.name in ("Chart.yaml", "kustomization.yaml"):
            raise OutputError(f"{file} cannot be mended in place", hint="mend plain YAML files; render others first")
        file.write_text("---\n".join(to_yaml(document.content) for document in listed))
    return list(files)
