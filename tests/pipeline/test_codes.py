"""Codes in the last pass: gradients against the whole model's, what moves and what stays, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import lowbit
from lowbit.api.effort import resolved, with_trained_codes
from lowbit.api.last_pass import last_pass_windows
from lowbit.api.quantize import recipe_for
from lowbit.api.run import Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.compiling import MOST_SHAPES
from lowbit.core.errors import RecipeError
from lowbit.core.progress import Silent
from lowbit.core.qtensor import QTensor
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.training import follow_, reproducible
from lowbit.formats.reader import ArtifactCheckpoint
from lowbit.methods.even_grid import EvenGrid
from lowbit.methods.kquants import CODECS
from lowbit.pipeline.codes import Codes, Start, check_memory
from lowbit.pipeline.factors import Factors
from lowbit.pipeline.self_sampling import Shelves
from lowbit.pipeline.student import Student
from lowbit.recipe import Recipe, preset
from tests.interrupted import StopAt

RECIPE: dict[str, Any] = {"method": "rtn", "bits": 3, "group_size": 32, "dataset": "pydoc", "seq_len": 64}
# layers of several kinds, others in every block
MIXED = [
    {"match": "*.layers.0.*.v_proj", "bits": 5},
    {"match": "*.layers.0.*.up_proj", "bits": 4},
    {"match": "*.layers.1.*.q_proj", "bits": 6},
    {"match": "*.layers.1.*.down_proj", "bits": 4, "group_size": 64},
]
TUNE = {"steps": 60, "rate": 3e-4, "codes": 0.02}
QUIET = Settings(device="cpu", verify=False)


def divergence(model: Path, artifact: Path) -> float:
    found = lowbit.evaluate(artifact, base=model, dataset="pydoc", windows=16, context=64)
    assert found.kl is not None
    return found.kl


def tensors_of(artifact: Path) -> dict[str, QTensor]:
    stored = ArtifactCheckpoint(open_checkpoint(artifact))
    return {path: stored.qtensor(path) for path in stored.modules}


class Recorded(Codes):
    """Keeps gradients instead of following them."""

    gradients: dict[int, list[torch.Tensor]]

    def descend(self, index: int, gradients: Any) -> None:
        self.gradients = {**getattr(self, "gradients", {}), index: list(gradients)}


def starts_of(base: StreamedModel, artifact: ArtifactCheckpoint) -> list[dict[str, Start]]:
    """Every layer of integers beside the base's weight, by block."""

    def grid(index: int, name: str) -> EvenGrid:
        path = f"{base.block_path(index)}.{name.removesuffix('.weight')}"
        return EvenGrid.of_tensor(artifact.qtensor(path)).to(base.device)

    return [
        {name: Start(weight, grid(index, name)) for name, weight in base.read_block(index).items() if weight.dim() == 2}
        for index in range(len(base.blocks))
    ]


def test_gradient_is_that_of_the_whole_model(tiny_llama: Path, tmp_path: Path) -> None:
    """A position's gradient is its weight's, through all of transformers' model at once, times the scale."""
    from transformers import AutoModelForCausalLM

    lowbit.quantize(tiny_llama, output=tmp_path / "start", settings=QUIET, **RECIPE)
    device = torch.device("cpu")
    base = StreamedModel(open_checkpoint(tiny_llama), device, torch.float32)
    stored = ArtifactCheckpoint(open_checkpoint(tmp_path / "start"))
    artifact = StreamedModel(stored, device, torch.float32)
    factors = Factors(artifact, {}, tmp_path / "state", device)
    starts = starts_of(base, stored)
    codes = Recorded(starts, tmp_path / "state", transposed=False)
    windows = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0))

    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    hidden: dict[str, torch.Tensor] = {}
    dense.model.norm.register_forward_pre_hook(lambda _, args: hidden.update(last=args[0]))
    with torch.no_grad():
        wanted = dense(windows).logits.log_softmax(-1)
    teacher = hidden["last"]
    state = {name: stored.read(name).float() for name in stored.tensors}
    leaves = {f"{path}.weight": state[f"{path}.weight"].requires_grad_() for path in stored.modules}
    log = torch.func.functional_call(dense, state | leaves, (windows,)).logits.log_softmax(-1)
    loss = (wanted.exp() * (wanted - log)).sum(-1).mean()
    by_weight = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    with base.outside(), artifact.outside():
        found = Student(base, artifact, factors, codes).gradients(windows, teacher)
    assert found == pytest.approx(loss.item(), rel=0.02)
    for index, groups in enumerate(codes._groups):
        assert sorted(name for group in groups for name in group.rows) == sorted(starts[index])
        for group, gradient in zip(groups, codes.gradients[index], strict=True):
            for name, rows in group.rows.items():
                grid, position = starts[index][name].grid, group.codes.position[rows]
                step = grid.scale.repeat_interleave(position.shape[1] // grid.scale.shape[1], 1)
                inside = (position >= 0) & (position <= grid.top)
                expected = (by_weight[f"{base.block_path(index)}.{name}"] * step * inside).flatten()
                own = gradient[rows].flatten()
                # products are in 16 bits
                assert torch.nn.functional.cosine_similarity(own, expected, dim=0) > 0.99, name
                assert own.norm() == pytest.approx(expected.norm().item(), rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("overrides", [[], MIXED], ids=["one kind", "several"])
def test_recorded_steps_are_the_plain_ones(tiny_llama: Path, tmp_path: Path, overrides: list[dict[str, Any]]) -> None:
    lowbit.quantize(tiny_llama, output=tmp_path / "start", settings=QUIET, overrides=overrides, **RECIPE)
    device = torch.device("cuda")
    base = StreamedModel(open_checkpoint(tiny_llama), device, torch.float16)
    stored = ArtifactCheckpoint(open_checkpoint(tmp_path / "start"))
    artifact = StreamedModel(stored, device, torch.float16)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 512, (4, 64), generator=generator).to(device) for _ in range(8)]
    teacher = torch.randn(4, 64, 64, generator=generator).half().to(device)
    losses: dict[str, list[float]] = {}
    places: dict[str, torch.Tensor] = {}
    for how in ("plain", "recorded", "compiled"):
        factors = Factors(artifact, {}, tmp_path / "state", device)
        codes = Codes(starts_of(base, stored), tmp_path / "state", transposed=False)
        # beyond its limit torch runs what it was to compile as it is, three times as slow
        limited = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
        with limited, reproducible(), base.outside(torch.float32), artifact.outside(torch.float32):
            student = Student(base, artifact, factors, codes)
            if how != "plain":
                assert student.can_record(batches[0][:1])
                student.record(compiling=how == "compiled")
            losses[how] = []
            for step, windows in enumerate(batches, start=1):
                codes.begin(step, 0.01)
                losses[how].append(student.gradients(windows, teacher).item())
                factors.descend(1e-3)
        places[how] = torch.cat([one.detach().flatten() for i in range(len(base.blocks)) for one in codes.positions(i)])
    assert losses["recorded"] == losses["plain"]
    assert torch.equal(places["recorded"], places["plain"])
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-3)
    assert (places["compiled"] - places["plain"]).abs().mean() < 1e-3


def test_blocks_are_given_their_weights_in_one_order(tiny_llama: Path, tmp_path: Path) -> None:
    """What is compiled for one order of names is not for another, and layers of one kind are trained together."""
    lowbit.quantize(tiny_llama, output=tmp_path / "start", settings=QUIET, overrides=MIXED, **RECIPE)
    device = torch.device("cpu")
    base = StreamedModel(open_checkpoint(tiny_llama), device, torch.float32)
    stored = ArtifactCheckpoint(open_checkpoint(tmp_path / "start"))
    artifact = StreamedModel(stored, device, torch.float32)
    codes = Codes(starts_of(base, stored), tmp_path / "state", transposed=False)
    kinds = [tuple(codes.weights(index)) for index in range(len(base.blocks))]
    student = Student(base, artifact, Factors(artifact, {}, tmp_path / "state", device), codes)
    orders: list[list[str]] = []
    inner = student._run_module
    student._run_module = lambda *given: (orders.append(list(given[1])), inner(*given))[1]
    with base.outside(), artifact.outside():
        student.loss(torch.randint(0, 512, (1, 8)), torch.randn(1, 8, 64))
    assert kinds[0] != kinds[1]
    assert orders == [[name for name, _ in block.named_parameters()] for block in base.blocks]


def test_steps_are_compiled_for_few_shapes_only() -> None:
    def of(count: int) -> Codes:
        grids = [EvenGrid(torch.zeros(rows, 32, dtype=torch.uint8), 7, torch.ones(rows, 1), torch.ones(rows, 1))
                 for rows in range(1, count + 1)]  # fmt: skip
        starts = [{"weight": Start(torch.randn(len(grid.codes), 32), grid)} for grid in grids]
        codes = Codes(starts, Path("nowhere"), transposed=False)
        codes.compile()
        return codes

    assert of(MOST_SHAPES)._follow is not follow_
    assert of(MOST_SHAPES + 1)._follow is follow_
    assert torch._dynamo.config.recompile_limit == MOST_SHAPES


def test_trained_codes_lower_the_divergence_and_scales_alone_do_less(tiny_llama: Path, tmp_path: Path) -> None:
    found = {}
    for codes in (0.0, TUNE["codes"]):
        made = lowbit.quantize(
            tiny_llama,
            output=tmp_path / str(codes),
            settings=QUIET,
            num_samples=96,
            tune={**TUNE, "codes": codes},
            **RECIPE,
        )
        found[codes] = divergence(tiny_llama, made.path)
        assert ("moved_codes" in made.record["tuning"]) == bool(codes)
    assert found[TUNE["codes"]] < 0.9 * found[0.0]
    before, after = (tensors_of(tmp_path / str(codes)) for codes in found)
    moved = [(before[path].codes != after[path].codes).float().mean().item() for path in before]
    assert 0 < sum(moved) / len(moved) < 0.2
    assert made.record["tuning"]["moved_codes"] == pytest.approx(sum(moved) / len(moved), rel=0.5)


def test_a_model_with_layer_norms_and_transposed_weights(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("gpt2", n_embd=64, n_layer=2, n_head=4)
    tune = {"steps": 20, "batch": 4, "codes": 0.05}
    found = [
        lowbit.quantize(model, output=tmp_path / str(n), settings=QUIET, num_samples=24, tune=each, **RECIPE)
        for n, each in enumerate(({}, tune))
    ]
    assert found[1].record["tuning"]["after"] < 0.9 * found[1].record["tuning"]["before"]
    assert divergence(model, found[1].path) < 0.9 * divergence(model, found[0].path)


def test_a_pass_that_goes_wrong_leaves_everything_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    start = lowbit.quantize(tiny_llama, output=tmp_path / "start", settings=QUIET, num_samples=16, **RECIPE)
    wild = {"steps": 3, "codes": 30.0}
    made = lowbit.quantize(tiny_llama, output=tmp_path / "wild", settings=QUIET, num_samples=16, tune=wild, **RECIPE)
    assert made.record["tuning"]["moved_codes"] == 0
    assert (made.path / "model.safetensors").read_bytes() == (start.path / "model.safetensors").read_bytes()


def test_an_interrupted_pass_continues_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    changes = {
        **RECIPE,
        "num_samples": 16,
        "seq_len": 32,
        "tune": {"steps": 136, "batch": 2, "codes": 0.01, "self_samples": 4},
    }
    whole = lowbit.quantize(tiny_llama, output=tmp_path / "whole", settings=QUIET, **changes)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(tiny_llama, output=tmp_path / "parts", settings=QUIET, progress=StopAt("tune", 131), **changes)
    assert (tmp_path / ".parts.unfinished" / "tuning.safetensors").exists()
    parts = lowbit.quantize(tiny_llama, output=tmp_path / "parts", settings=QUIET, **changes)
    assert (whole.path / "model.safetensors").read_bytes() == (parts.path / "model.safetensors").read_bytes()
    assert whole.record["tuning"] == parts.record["tuning"]
    assert not [file.name for file in parts.path.iterdir() if "tun" in file.name or "sampled" in file.name]


@pytest.mark.parametrize("method", ["q4_k_m", "q3_k_s"])
def test_codes_of_a_gguf_file(wide_llama: Path, wide_gguf: Path, tmp_path: Path, method: str) -> None:
    """Codes and float scales move, types and integer scales stay, and the divergence falls further than with scales."""
    # damped so far that second-order rounding only rounds to nearest: a start that leaves something to gain
    rough: dict[str, Any] = {
        "dataset": "pydoc",
        "num_samples": 96,
        "seq_len": 64,
        "options": {"sweeps": 0, "damping": 100.0},
    }
    files = {}
    for codes in (0.0, TUNE["codes"]):
        made = lowbit.quantize(
            wide_gguf,
            output=tmp_path / f"{codes}.gguf",
            method=method,
            settings=QUIET,
            tune={**TUNE, "codes": codes},
            **rough,
        )
        files[codes] = made.path
    kl = {codes: divergence(wide_llama, path) for codes, path in files.items()}
    assert kl[TUNE["codes"]] < 0.95 * kl[0.0]
    assert 0 < made.record["tuning"]["moved_codes"] < 0.2
    before, after = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in files.values())
    changed = set()
    for name, old in before.items():
        assert old.tensor_type == after[name].tensor_type
        if old.tensor_type.name not in CODECS or not name.startswith("blk."):
            continue
        (old_grid, old_codes), (new_grid, new_codes) = (
            CODECS[old.tensor_type.name].unpack(torch.tensor(t.data)) for t in (old, after[name])
        )
        assert torch.equal(old_grid.scale_codes, new_grid.scale_codes)
        assert (old_codes.int() - new_codes.int()).abs().max() <= 2
        if not torch.equal(old_codes, new_codes):
            changed.add(name.split(".")[2])
    assert changed >= {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}


def test_codes_are_not_trained_beside_weights_that_a_transform_changed(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="awq changes"):
        lowbit.quantize(tiny_llama, output=tmp_path / "out", method="awq", settings=QUIET, tune=TUNE, group_size=32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "name"), [("fp8", "out"), ("iq4_nl", "out.gguf")])
def test_grids_without_even_steps_have_no_codes_to_train(
    wide_llama: Path, tmp_path: Path, method: str, name: str
) -> None:
    with pytest.raises(RecipeError, match="even steps"):
        lowbit.quantize(
            wide_llama, output=tmp_path / name, method=method, settings=QUIET, tune_codes=True, dataset="pydoc"
        )
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_refused_before_any_work(tiny_llama: Path) -> None:
    model = StreamedModel(open_checkpoint(tiny_llama), torch.device("cpu"), torch.float32)
    check_memory(model)
    model.blocks[0].register_parameter("huge", torch.nn.Parameter(torch.empty(2**40, device="meta")))
    with pytest.raises(RecipeError, match=r"16384\.\d GiB .* free"):
        check_memory(model)


def test_the_model_goes_on_from_the_text_of_the_calibration_and_from_nothing_else(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = preset("gptq").updated(dataset="pydoc+self", num_samples=4, seq_len=64)
    recipe = Recipe.parse({**recipe.model_dump(), "tune": {"steps": 1, "self_samples": 6}})
    text, own = torch.arange(128).view(2, 64), torch.full((2, 64), 400)
    device = torch.device("cpu")
    shelves = Shelves(tmp_path / "work", tmp_path / "library")
    windows = last_pass_windows(open_checkpoint(tiny_llama), recipe, torch.cat([text, own]), device, shelves, Silent())
    assert windows.shape == (10, 64)
    assert torch.equal(windows[:4], torch.cat([text, own]))
    for window in windows[7:]:
        assert torch.equal(window[:16], window[0] + torch.arange(16))


def test_the_flag_is_plain_fields_of_the_recipe() -> None:
    tune = with_trained_codes(preset("gptq")).tune
    assert tune.codes > 0
    assert tune.steps > 100
    assert tune.self_samples > 0


@pytest.mark.parametrize(
    ("method", "effort", "asked", "gpu_bytes", "trains"),
    [
        ("q4_k_m", "best", None, 2**40, True),
        ("q4_k_m", "best", None, 2**20, False),
        ("q4_k_m", "best", None, 0, False),
        ("q4_k_m", "best", False, 2**40, False),
        ("q4_k_m", "best", True, 0, True),
        ("q4_k_m", "balanced", None, 2**40, False),
        ("iq4_nl", "best", None, 2**40, False),
        ("gptq", "best", None, 2**40, False),
    ],
)
def test_best_trains_the_codes_of_k_quants_where_a_gpu_has_room(
    wide_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    effort: str,
    asked: bool | None,
    gpu_bytes: int,
    trains: bool,
) -> None:
    # there may be no GPU here: its name and its size stand in for it
    monkeypatch.setattr("lowbit.api.effort.pick_device", lambda _: torch.device("cuda" if gpu_bytes else "cpu"))
    monkeypatch.setattr("lowbit.api.effort.memory_of", lambda _: gpu_bytes)
    recipe = resolved(recipe_for(method).updated(dataset="pydoc"), effort, wide_llama, "auto", tune_codes=asked)
    assert (recipe.tune.codes > 0) == trains
    assert (recipe.tune.steps > 0) == (effort == "best")


def test_named_steps_are_of_scales_alone_unless_codes_are_named_too(
    wide_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as above: a GPU's name and size
    monkeypatch.setattr("lowbit.api.effort.pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("lowbit.api.effort.memory_of", lambda _: 2**40)
    recipe = recipe_for("q4_k_m").updated(dataset="pydoc")
    for asked in (None, True):
        tune = resolved(recipe, "best", wide_llama, "auto", tune_steps=10, tune_codes=asked).tune
        assert tune.steps == 10
        assert (tune.codes > 0) == bool(asked)
