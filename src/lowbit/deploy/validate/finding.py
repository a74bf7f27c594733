"""What a rule found: where, why, and what mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.deploy.documents import Document, KeyPath

REMOVE = object()


@dataclass(frozen=True)
class Change:
    """Put `value` at `path`; REMOVE takes the entry out. Mappings on the way are made."""

    path: KeyPath
    value: Any


@dataclass(frozen=True)
class Finding:
    """rule: its name, stable. severity: "error" does not work, "warning" works badly or by luck. mend: what to do.
    changes: what `--fix` does; () where a person has to decide."""

    rule: str
    severity: Literal["error", "warning"]
    document: Document
    path: KeyPath
    message: str
    mend: str
    changes: Sequence[Change] = ()

    @property
    def line(self) -> int:
        """In the file."""
        return self.document.line(self.path)

    @property
    def where(self) -> str:
        """ "Deployment/llama spec.replicas"."""
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).lstrip(".")
        named = f"{self.document.kind}/{self.document.name}" if self.document.kind else "fragment"
        return f"{named} {dotted}".strip()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "file": str(self.document.file),
            "line": self.line,
            "where": self.where,
            "message": self.message,
            "mend": self.mend,
            "fixable": bool(self.changes),
        }


def apply_change(content: Any, change: Change) -> None:
    """Change a document's content in place."""
    place: Any = content
    *above, last = change.path
    for part in above:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    if change.value is REMOVE:
        # of a list, marked now and dropped by the caller, so that other changes' numbers stay right
        if isinstance(place, dict):
            place.pop(last, None)
        else:
            place[last] = REMOVE
    else:
        place[last] = change.value


def swept(content: Any) -> Any:
    """Without the items that were marked."""
    if isinstance(content, dict):
        return {key: swept(value) for key, value in content.items()}
    if isinstance(content, list):
        return [swept(item) for item in content if item is not REMOVE]
    return content
