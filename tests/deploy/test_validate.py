"""Every seeded fault is found by the rule that is meant for it; what is whole gets no finding."""

from __future__ import annotations

import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowbit.deploy.documents import Document, read_documents
from lowbit.deploy.template import objects
from lowbit.deploy.validate import validate
from lowbit.deploy.validate.fix import fixed
from lowbit.deploy.validate.sizes import weights_of

from .faults import FAULTS, FINE, Edit, good
from .matrix import Case


def documents(contents: Iterable[dict[str, Any]]) -> list[Document]:
    return [Document(Path("x.yaml"), number, content) for number, content in enumerate(contents)]


@pytest.mark.parametrize(("what", "edit"), FINE, ids=[what for what, _ in FINE])
def test_no_false_alarm_on_what_real_charts_do(what: str, edit: Edit) -> None:
    contents = good()
    edit(contents)
    assert not [(f.rule, f.message) for f in validate(documents(contents)) if f.severity == "error"]


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 40
    assert not [str(finding) for finding in validate(documents(good()))]


@pytest.mark.parametrize(("rule", "message", "edit"), FAULTS, ids=[f"{rule}-{text}" for rule, text, _ in FAULTS])
def test_fault_is_found(rule: str, message: str, edit: Edit) -> None:
    contents = good()
    edit(contents)
    assert json.dumps(contents) != json.dumps(good())
    found = [finding for finding in validate(documents(contents)) if finding.rule == rule]
    assert any(message in finding.message + finding.mend for finding in found), [f.message for f in found]
    for finding in found:
        assert finding.mend
        if finding.changes:  # what can be mended by a machine is mended
            made = fixed(documents(contents), [finding])
            after = [(f.rule, f.message, f.document.place) for f in validate(made)]
            assert (finding.rule, finding.message, finding.document.place) not in after


def test_no_false_alarm_on_what_lowbit_writes(matrix: list[Case]) -> None:
    seen = 0
    for case in matrix:
        for values in case.profiles.values():
            contents = objects(case.templates, case.release, values)
            found = validate(documents(deepcopy(contents)))
            assert not found, f"{case.name}: {[(f.rule, f.where, f.message) for f in found]}"
            seen += len(contents)
    assert seen > 500


def test_kustomize_trees_are_read_as_kubectl_renders_them(matrix: list[Case], kubectl: str, tmp_path: Path) -> None:
    import subprocess

    from lowbit.deploy.outputs.files import write_folder

    case = next(case for case in matrix if "keda" in case.name)
    write_folder(tmp_path / "d", case.files)
    for profile in case.profiles:
        folder = tmp_path / f"d/kustomize/overlays/{profile}"
        shown = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=True).stdout
        by_kubectl = {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(shown)}
        own = {(d.kind, d.name): d.content for d in read_documents([folder])}
        assert own == by_kubectl


def test_lines_and_places(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("kind: Job\napiVersion: batch/v1\nmetadata:\n  name: x\nspec:\n  template:\n    spec:\n"
                    "      restartPolicy: Always\n      containers:\n        - name: a\n          image: b:1\n")  # fmt: skip
    finding = next(f for f in validate(read_documents([file])) if f.rule == "restart-policy")
    assert (finding.line, finding.where) == (8, "Job/x spec.template.spec.restartPolicy")


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("Llama-2-7b-awq", 4.2), ("llama-2-7b-chat.Q4_K_M.gguf", 4.2), ("Mixtral-8x7B", 93), ("SmolLM2-135M", 0.27),
     ("Llama-3.1-70B-fp8", 74), ("model", None), ("v2b", None)],
)  # fmt: skip
def test_sizes_by_name(name: str, gigabytes: float | None) -> None:
    found = weights_of(f"/models/{name}")
    assert found is None if gigabytes is None else found == pytest.approx(gigabytes * 1e9, rel=0.05)
