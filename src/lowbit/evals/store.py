"""Finished task results on disk, so that nothing is run twice: not after a crash, not the base again for every artifact."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lowbit.evals.tasks.harness import LeafResult


class ResultStore:
    """A directory of one JSON file for each result, named by a hash of everything that it depends on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, key: Mapping[str, Any]) -> LeafResult | None:
        """A result that was kept under the same key; None when there is none, or it cannot be read."""
        try:
            content = json.loads(self._file(key).read_text())
            return LeafResult(**{field.name: content["result"][field.name] for field in fields(LeafResult)})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: Mapping[str, Any], result: LeafResult) -> None:
        """Keep a result; the file is there whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self._file(key)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({"key": dict(key), "result": result.to_dict()}))
        os.replace(partial, file)

    def _file(self, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        return self.directory / f"{digest[:40]}.json"
