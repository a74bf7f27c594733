"""Learned rounding and the last pass: on a tiny model, against the whole model run by transformers."""

from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.api.run import Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.streamed_model import StreamedModel
from lowbit.formats.reader import ArtifactCheckpoint
from lowbit.pipeline.factors import Factors
from lowbit.pipeline.student import Student
from lowbit.pipeline.tune import _keep_best_share
from tests.interrupted import StopAt

RECIPE = {"bits": 3, "group_size": 32, "dataset": "pydoc", "num_samples": 24, "seq_len": 64}


def quantized(model: Path, output: Path, **changes: object) -> Path:
    lowbit.quantize(model, output=output, settings=Settings(device="cpu"), **{**RECIPE, **changes})
    return output


def divergence(model: Path, artifact: Path) -> float:
    found = lowbit.evaluate(artifact, base=model, dataset="pydoc", windows=16, context=64)
    assert found.kl is not None
    return found.kl


@pytest.fixture(scope="module")
def start(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny_llama, tmp_path_factory.mktemp("start") / "gptq", method="gptq")


def test_gradient_is_that_of_the_whole_model(tiny_llama: Path, start: Path, tmp_path: Path) -> None:
    """Block by block, from kept inputs: the same gradient as autograd through all of transformers' model at once."""
    device = torch.device("cpu")
    base = StreamedModel(open_checkpoint(tiny_llama), device, torch.float32)
    stored = ArtifactCheckpoint(open_checkpoint(start))
    artifact = StreamedModel(stored, device, torch.float32)
    columns = {path: stored.qtensor(path).column_groups() for path in stored.modules}
    factors = Factors(artifact, columns, tmp_path / "state", device)
    windows = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0))

    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        teacher = dense(windows, output_hidden_states=True)
    state = {name: stored.read(name).float() for name in stored.tensors}
    leaves = {}
    for index in range(len(artifact.blocks)):
        for name, factor in factors.block(index).items():
            leaves[index, name] = factor.clone().requires_grad_()
            full = f"{artifact.block_path(index)}.{name}"
            state[full] = factors.apply(index, name, state[full], {name: leaves[index, name]})
    log = torch.func.functional_call(dense, state, (windows,)).logits.log_softmax(-1)
    wanted = teacher.logits.log_softmax(-1)
    loss = (wanted.exp() * (wanted - log)).sum(-1).mean()
    expected = torch.autograd.grad(loss, list(leaves.values()))

    # the states before the final norm, as the streamed model keeps them
    hidden = {}
    dense.model.norm.register_forward_pre_hook(lambda _, args: hidden.update(last=args[0]))
    with torch.no_grad():
        dense(windows)
    with base.outside(), artifact.outside():
        found = Student(base, artifact, factors).gradients(windows, hidden["last"])
    assert found == pytest.approx(loss.item(), rel=0.02)
    flat = torch.cat([gradient.flatten() for gradient in expected])
    assert torch.nn.functional.cosine_similarity(factors.gradient, flat, dim=0) > 0.995  # products are in 16 bits
    assert factors.gradient.norm() == pytest.approx(flat.norm().item(), rel=0.03)


def test_tuning_lowers_the_divergence(tiny_llama: Path, tmp_path: Path) -> None:
    start = quantized(tiny_llama, tmp_path / "start", method="rtn")
    tuned = quantized(tiny_llama, tmp_path / "tuned", method="rtn", num_samples=48, seq_len=128, tune_steps=40)
    assert divergence(tiny_llama, tuned) < 0.95 * divergence(tiny_llama, start)
    before, after = ArtifactCheckpoint(open_checkpoint(start)), ArtifactCheckpoint(open_checkpoint(tuned))
    path = before.modules[0]
    assert torch.equal(before.qtensor(path).codes, after.qtensor(path).codes)
    assert not torch.equal(before.qtensor(path).scale, after.qtensor(path).scale)


@pytest.mark.parametrize(("beyond", "share"), [(1.0, 1.0), (2.0, 0.5), (3.7, 0.25), (40.0, 0.25)])
def test_the_best_share_of_what_was_learned_is_kept(beyond: float, share: float) -> None:
    optimum = torch.randn(7, generator=torch.Generator().manual_seed(0))
    values = optimum * beyond
    learned = values.clone()
    loss = _keep_best_share(values, lambda: (values - optimum).square().sum().item())
    torch.testing.assert_close(values, learned * share)
    assert loss == pytest.approx((learned * share - optimum).square().sum().item())


@pytest.mark.parametrize("changes", [{}, {"symmetric": False}, {"kind": "mxfp4", "bits": 4, "group_size": 32}])
def test_learned_rounding_lowers_the_divergence(tiny_llama: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    # damped so far that GPTQ only rounds to nearest: a start that leaves something to learn
    options = {"reach": 1.0, "batch": 4, "percdamp": 100.0, "asymmetric": 0}
    numbers = []
    for steps in (0, 40):
        made = quantized(
            tiny_llama, tmp_path / str(steps), method="autoround", options={**options, "steps": steps}, **changes
        )
        numbers.append(divergence(tiny_llama, made))
    assert numbers[1] < 0.97 * numbers[0]


@pytest.mark.parametrize("method", ["mxfp4", "nvfp4", "nvfp4_a4"])
def test_best_trains_small_floats_from_rounding_to_nearest(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    own = {"method": method, "bits": None, "group_size": None}
    nearest = quantized(tiny_llama, tmp_path / "nearest", **own)
    options = {"search": True, "steps": 40, "batch": 4, "reach": 1.0}
    best = quantized(tiny_llama, tmp_path / "best", **own, effort="best", options=options, tune_steps=4)
    assert divergence(tiny_llama, best) < 0.95 * divergence(tiny_llama, nearest)
    one, other = (open_checkpoint(made) for made in (nearest, best))
    assert one.tensors.keys() == other.tensors.keys()
    assert one.config["quantization_config"] == other.config["quantization_config"]


def test_best_gives_the_same_bytes_again(tiny_llama: Path, tmp_path: Path) -> None:
    def make(name: str) -> bytes:
        made = quantized(
            tiny_llama, tmp_path / name, method="gptq", effort="best", options={"steps": 6}, num_samples=12
        )
        assert sorted(file.name for file in made.iterdir() if "tun" in file.name or "sampled" in file.name) == []
        return (made / "model.safetensors").read_bytes()

    assert make("one") == make("two")


def test_an_interrupted_last_pass_continues_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    changes = {"method": "rtn", "tune_steps": 24, "num_samples": 16}
    whole = quantized(tiny_llama, tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(
            tiny_llama,
            output=tmp_path / "parts",
            settings=Settings(device="cpu"),
            progress=StopAt("tune", 19),
            **{**RECIPE, **changes},
        )
    assert (tmp_path / ".parts.unfinished" / "tuning.safetensors").exists()
    parts = quantized(tiny_llama, tmp_path / "parts", **changes)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
