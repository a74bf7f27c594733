"""Comments in manifests: above the lines that they explain, never in data."""

from __future__ import annotations

import yaml

from lowbit.deploy.outputs.comments import commented
from lowbit.deploy.outputs.files import to_yaml

from .matrix import Case


def test_comments_are_above_their_lines() -> None:
    text = to_yaml({"spec": {"strategy": {"maxSurge": 0}, "rules": [{"action": "Ignore"}, {"action": "FailJob"}]}})
    lines = commented(text).splitlines()
    surge = next(i for i, line in enumerate(lines) if "maxSurge" in line)
    assert lines[surge - 1].startswith("    # a GPU")
    ignored = next(i for i, line in enumerate(lines) if "action: Ignore" in line)
    assert lines[ignored - 1].startswith("    # an eviction")
    assert sum(line.lstrip().startswith("#") for line in lines) == 2


def test_a_number_that_only_begins_alike_is_not_explained() -> None:
    assert commented("maxSurge: 05\nbackoffLimit: 06\n") == "maxSurge: 05\nbackoffLimit: 06\n"


def test_data_stays_as_it_is() -> None:
    content = {"data": {"a.yaml": "maxSurge: 0\npreStop:\n  x: 1\n"}, "preStop": {}}
    text = commented(to_yaml(content))
    assert yaml.safe_load(text) == content
    assert text.count("#") == 1


def test_every_manifest_says_the_same_with_comments(matrix: list[Case]) -> None:
    seen = 0
    for case in matrix:
        for name, text in case.files.items():
            if name.startswith("kustomize/base/") and not name.endswith("kustomization.yaml"):
                bare = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("# "))
                assert yaml.safe_load(text) == yaml.safe_load(bare)
                seen += text != bare + "\n"
    assert seen > 60
