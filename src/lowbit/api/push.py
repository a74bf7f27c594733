"""Upload an artifact to the Hugging Face hub: checked first, resumable, with its model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit.api.record import verify_checksums
from lowbit.core.errors import CheckpointError, OutputError, RecipeError

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class PushFile:
    """path: here. name: in the repository. bytes: its size."""

    path: str
    name: str
    bytes: int


@dataclass(frozen=True)
class PushPlan:
    """What would be uploaded. verified: every file with a checksum has it; False where there are none."""

    repo: str
    private: bool
    files: tuple[PushFile, ...]
    verified: bool

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "bytes": self.bytes}


def push_plan(artifact: str | Path, repo: str, *, private: bool = False) -> PushPlan:
    """The files of an artifact and their checksums, checked. artifact: a directory, or a .gguf file with what lowbit wrote
    beside it (its card becomes README.md).

    Raises RecipeError for a name that is no repository, CheckpointError for files that are missing or were changed.
    """
    if not _REPO.fullmatch(repo):
        raise RecipeError(f"{repo!r} is not the name of a repository", hint="ORG/NAME, such as my-org/llama-3-8b-w4a16")
    path = Path(artifact)
    if path.suffix == ".gguf":
        record_file = path.with_suffix(".lowbit.json")
        files, folder = _gguf_files(path), path.parent
    else:
        record_file, folder = path / "lowbit.json", path
        files = _directory_files(path)
    record: Mapping[str, Any] = json.loads(record_file.read_text()) if record_file.is_file() else {}
    changed = verify_checksums(folder, record)
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)} in {folder} differ from their checksums, so nothing was uploaded",
            hint="copy or quantize it again",
        )
    return PushPlan(repo, private, tuple(files), bool(record.get("checksums")))


def push(plan: PushPlan, *, revision: str | None = None, message: str | None = None) -> str:
    """Upload; returns the address of the commit, or of the repository where several were needed. Run it again to continue:
    files that are there already are not sent twice.

    Raises OutputError when the hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    api = HfApi(library_name="lowbit")
    try:
        api.create_repo(plan.repo, private=plan.private, exist_ok=True, repo_type="model")
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.path) for file in plan.files]
        # large files are uploaded before the commit and recognized by their hash on the next try
        commit = api.create_commit(
            plan.repo,
            operations,
            commit_message=message or "Quantized by lowbit",
            revision=revision,
            num_threads=4,
        )
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        cause = (str(error).strip().splitlines() or ["no connection"])[0][:200]
        raise OutputError(
            f"{plan.repo} could not be uploaded: {cause}",
            hint="log in with `hf auth login` (a token that may write), then run it again: finished files are kept",
        ) from error
    return str(commit.commit_url)


def _directory_files(folder: Path) -> list[PushFile]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no artifact: it has no config.json", hint="lowbit quantize makes one")
    # what is hidden or half-written is nobody's business on the hub
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _hidden(file.relative_to(folder))]
    return [PushFile(str(file), file.relative_to(folder).as_posix(), file.stat().st_size) for file in found]


def _gguf_files(file: Path) -> list[PushFile]:
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist", hint="give a .gguf file that lowbit quantize wrote")
    stem = file.name.removesuffix(".gguf")
    first, split, _ = stem.partition("-00001-of-")
    shards = sorted(file.parent.glob(f"{first}-?????-of-?????.gguf")) if split else [file]
    beside = {f"{first}.lowbit.json": f"{first}.lowbit.json", f"{first}.card.md": "README.md",
              f"{first}.Modelfile": f"{first}.Modelfile"}  # fmt: skip
    files = [PushFile(str(shard), shard.name, shard.stat().st_size) for shard in shards]
    for name, remote in beside.items():
        if (path := file.parent / name).is_file():
            files.append(PushFile(str(path), remote, path.stat().st_size))
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts) or path.suffix in (".tmp", ".incomplete", ".part")
