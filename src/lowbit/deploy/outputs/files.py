"""YAML as people write it, and files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lowbit.core.errors import OutputError


class _Dumper(yaml.SafeDumper):
    """Lists are indented below their key, long strings of lines are blocks, nothing is an anchor."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent lists."""
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        """Never."""
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _string)


def to_yaml(content: Any) -> str:
    """One document."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def write_folder(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Write `files` (relative path -> text) as `folder`, in one step. Raises OutputError when something is there that
    lowbit did not write, or it cannot be written."""
    marker = ".lowbit-deploy"
    if folder.exists() and not (folder / marker).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists already and was not written by lowbit deploy", hint="choose another -o")
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
        work.chmod(0o755)
        for name, text in {**files, marker: "written by lowbit deploy; a second run replaces this folder\n"}.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(work, folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}", hint="choose another -o") from error
    return [folder / name for name in files]
