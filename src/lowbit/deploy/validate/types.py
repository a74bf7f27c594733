"""Values of the wrong kind: numbers as text, text as numbers, words that are no list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowbit.deploy.documents import Document, KeyPath
from lowbit.deploy.validate.finding import Change, Finding
from lowbit.deploy.validate.view import at, items, pods


def _types(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for key in ("replicas", "backoffLimit", "completions", "parallelism", "progressDeadlineSeconds"):
        value = at(document.content, "spec", key)
        if isinstance(value, str):
            fix = (Change(("spec", key), int(value)),) if value.isdigit() else ()
            yield Finding(
                "wrong-type",
                "error",
                document,
                ("spec", key),
                f"{key} is the text {value!r}, not a number",
                "write it without quotes",
                fix,
            )
    for pod in pods(document):
        for container in pod.every_container:
            for key in ("command", "args"):
                given = container.content.get(key)
                if isinstance(given, str):
                    yield Finding(
                        "wrong-type",
                        "error",
                        document,
                        (*container.path, key),
                        f"{key} is one text, not a list",
                        "write one item for each word",
                        (Change((*container.path, key), given.split()),),
                    )
                for index, word in enumerate(given if isinstance(given, list) else ()):
                    if not isinstance(word, str):
                        yield _unquoted(document, (*container.path, key, index), word, f"{word!r} is no text")
            for index, entry in enumerate(items(container.content.get("env"))):
                value = entry.get("value")
                if value is not None and not isinstance(value, str):
                    said = f"{entry.get('name')} is {value!r}, and variables are text"
                    yield _unquoted(document, (*container.path, "env", index, "value"), value, said)
            for index, port in enumerate(items(container.content.get("ports"))):
                if isinstance(port.get("containerPort"), str):
                    place = (*container.path, "ports", index, "containerPort")
                    fix = (Change(place, int(port["containerPort"])),) if port["containerPort"].isdigit() else ()
                    yield Finding(
                        "wrong-type",
                        "error",
                        document,
                        place,
                        "containerPort is a text, not a number",
                        "write it without quotes",
                        fix,
                    )


def _unquoted(document: Document, place: KeyPath, value: object, said: str) -> Finding:
    return Finding("wrong-type", "error", document, place, said, "quote it", (Change(place, _text(value)),))


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


RULES = (_types,)
