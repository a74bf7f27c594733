"""The same integers in another format, bit for bit, or a refusal that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.api.convert import convert
from lowbit.api.quantize import quantize
from lowbit.api.record import read_record, verify_checksums
from lowbit.api.run import Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import FormatError, OutputError
from lowbit.formats.reader import ArtifactCheckpoint, open_artifact
from lowbit.recipe import preset

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def artifact(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    model = make_model()

    def make(base: str = "rtn", **changes: Any) -> Path:
        recipe = preset(base).updated(
            **{"group_size": 32, "dataset": "pydoc", "num_samples": 4, "seq_len": 32, **changes}
        )
        output = tmp_path_factory.mktemp("artifact") / "out"
        return quantize(model, output=output, recipe=recipe, settings=Settings(verify=False)).path

    return make


def opened(path: Path) -> ArtifactCheckpoint:
    found = open_artifact(open_checkpoint(path))
    assert isinstance(found, ArtifactCheckpoint)
    return found


def assert_equal_weights(left: Path, right: Path) -> None:
    before, after = opened(left), opened(right)
    assert set(before.tensors) == set(after.tensors)
    assert set(before.modules) == set(after.modules) != set()
    for name in before.tensors:
        assert torch.equal(before.read(name), after.read(name)), name


PATHS = [
    ({}, ["gptq", "gptq_v2", "awq"]),
    ({"format": "gptq"}, ["compressed-tensors", "awq", "gptq_v2"]),
    ({"symmetric": False}, ["awq", "gptq_v2"]),
    ({"symmetric": False, "format": "awq"}, ["compressed-tensors", "gptq_v2"]),
    # a symmetric layer becomes one with zero points of 8 in awq, and comes back symmetric
    ({"format": "awq"}, ["gptq"]),
]


@pytest.mark.parametrize(("changes", "formats"), PATHS)
def test_there_and_back_without_loss(
    artifact: Make, tmp_path: Path, changes: dict[str, Any], formats: list[str]
) -> None:
    source = artifact(**changes)
    for name in formats:
        there = convert(source, format=name, output=tmp_path / name)
        assert opened(there).format.name == name
        assert_equal_weights(source, there)
        record = read_record(there)
        assert record is not None
        assert record["recipe"]["format"] == name
        assert verify_checksums(there, record) == []
        back = convert(there, format=opened(source).format.name, output=tmp_path / f"{name}-back")
        assert_equal_weights(source, back)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "target", "reason"),
    [
        ({"symmetric": False, "format": "gptq_v2"}, "gptq", "zero"),
        ({"bits": 8}, "awq", "4 bit"),
        ({"base": "fp8", "group_size": 0}, "gptq", "integer"),
        (
            {"base": "gptq", "format": "gptq", "options": {"act_order": "desc"}},
            "compressed-tensors",
            "static act-order",
        ),
        ({"base": "w8a8", "group_size": 0}, "gptq", "activations"),
    ],
)
def test_what_would_lose_is_refused(
    artifact: Make, tmp_path: Path, changes: dict[str, Any], target: str, reason: str
) -> None:
    source = artifact(**changes)
    with pytest.raises(FormatError, match=reason) as refused:
        convert(source, format=target, output=tmp_path / "out")
    assert "model.layers.0" in refused.value.message
    assert refused.value.hint
    assert not list(tmp_path.iterdir())


def test_scales_that_would_round_are_refused(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    recipe = preset("rtn").updated(group_size=32, dtype="bfloat16", format="awq")
    source = quantize(model, output=tmp_path / "awq", recipe=recipe, settings=Settings(verify=False)).path
    with pytest.raises(FormatError, match="rounded"):
        convert(source, format="compressed-tensors", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_model_or_a_taken_output_is_refused(make_model: Make, artifact: Make, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not quantized"):
        convert(make_model(), format="gptq", output=tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError):
        convert(artifact(), format="gptq", output=tmp_path / "full")
