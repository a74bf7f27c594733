"""Is the artifact still what was written? Checksums, computed once for as long as a file's size and time stay the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/lowbit/checksums.json`, by default in `~/.cache`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "lowbit" / "checksums.json"


def changed_files(folder: Path, expected: Mapping[str, str], cache: Path | None = None) -> list[str]:
    """Names in `expected` (file name -> hex SHA-256) that are missing in `folder` or differ."""
    store = cache or default_cache()
    known = _load(store)
    changed = []
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file():
            changed.append(name)
            continue
        status = file.stat()
        key = f"{file.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
        if key not in known:
            with file.open("rb") as stream:
                known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        if known[key] != digest:
            changed.append(name)
    _save(store, known)
    return changed


def _load(store: Path) -> dict[str, str]:
    try:
        content = json.loads(store.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _save(store: Path, known: Mapping[str, str]) -> None:
    temporary = store.with_name(f".{store.name}.{os.getpid()}")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        # the newest are at the end; a cache needs no more
        temporary.write_text(json.dumps(dict(list(known.items())[-1000:])))
        temporary.replace(store)
    except OSError:
        temporary.unlink(missing_ok=True)  # a home that cannot be written costs time only
