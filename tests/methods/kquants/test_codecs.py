"""Bytes and values against ggml's own row quantizers, as libgguf binds them."""

from __future__ import annotations

import itertools

import libgguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.core.errors import FormatError
from lowbit.core.ggml_types import GGML_TYPES, ggml_type
from lowbit.methods.kquants import CODECS, Grid, decode, encode

from .distributions import COLS, DISTRIBUTIONS, IMPORTANCES, ROWS, generator


def ggml_bytes(name: str, weights: Tensor, importance: Tensor | None = None) -> np.ndarray:
    return libgguf.quantize_rows(
        weights.numpy(), GGML_TYPES[name].id, None if importance is None else importance.numpy()
    )


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", CODECS)
def test_bytes_equal_ggml(name, distribution, importance):
    g = generator(name, distribution, importance)
    weights, column_importance = DISTRIBUTIONS[distribution](g), IMPORTANCES[importance](g)
    codec = CODECS[name]
    ours = codec.pack(*codec.choose(weights, column_importance)).numpy()
    np.testing.assert_array_equal(ours, ggml_bytes(name, weights, column_importance))


@pytest.mark.parametrize("distribution", ["normal", "scales far apart", "sparse", "zeros of both signs", "denormal"])
@pytest.mark.parametrize("name", CODECS)
def test_values_equal_ggml_and_bytes_survive_a_round_trip(name, distribution):
    data = ggml_bytes(name, DISTRIBUTIONS[distribution](generator(name, distribution)))
    stored = torch.from_numpy(data)
    np.testing.assert_array_equal(
        decode(name, stored, COLS).numpy(), libgguf.dequantize_rows(data, GGML_TYPES[name].id)
    )
    codec = CODECS[name]
    np.testing.assert_array_equal(codec.pack(*codec.unpack(stored)).numpy(), data)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), exponents=st.tuples(st.integers(-38, 3), st.integers(0, 12)), rows=st.integers(1, 3)
)
def test_bytes_equal_ggml_whatever_the_weights(name, seed, exponents, rows):
    g = torch.Generator().manual_seed(seed)
    low, spread = exponents
    magnitudes = 10 ** (low + spread * torch.rand(rows, 512 // 16, generator=g)).repeat_interleave(16, dim=1)
    weights = torch.randn(rows, 512, generator=g) * magnitudes
    importance = torch.rand(512, generator=g) ** 4
    for given_importance in (None, importance):
        codec = CODECS[name]
        ours = codec.pack(*codec.choose(weights, given_importance)).numpy()
        np.testing.assert_array_equal(ours, ggml_bytes(name, weights, given_importance))


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q4_0", "Q8_0"])
def test_chunks_do_not_show(name, monkeypatch):
    weights, importance = torch.randn(ROWS, COLS), torch.rand(COLS)
    monkeypatch.setattr("lowbit.methods.kquants.rows.CHUNK_WEIGHTS", 4 * COLS)
    monkeypatch.setattr("lowbit.methods.kquants.search.SLICE_WEIGHTS", 32 * 5)
    monkeypatch.setattr("lowbit.methods.kquants.symmetric.SLICE_WEIGHTS", 32 * 3)
    data = encode(name, weights, importance, native=False)
    np.testing.assert_array_equal(data.numpy(), ggml_bytes(name, weights, importance))
    np.testing.assert_array_equal(
        decode(name, data, COLS).numpy(), libgguf.dequantize_rows(data.numpy(), ggml_type(name).id)
    )


def test_input_need_not_be_contiguous():
    weights = torch.randn(COLS, 256).T
    np.testing.assert_array_equal(
        encode("Q4_K", weights, native=False).numpy(), ggml_bytes("Q4_K", weights.contiguous())
    )


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_storage_types(name):
    weights = torch.randn(3, 40)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
    data = encode(name, weights, native=False)
    assert data.shape == (3, 40 * dtype.itemsize)
    assert torch.equal(data.view(dtype), weights.to(dtype))
    assert torch.equal(decode(name, data, 40), weights.to(dtype).float())


@pytest.mark.parametrize("name", [name for name in CODECS if name.endswith("_K")])
def test_k_quant_codes_are_the_rounding_of_their_grid(name):
    weights = torch.randn(ROWS, COLS)
    codec = CODECS[name]
    grid, codes = codec.choose(weights, torch.rand(COLS))
    assert torch.equal(codec.round(weights, grid), codes)


@pytest.mark.parametrize("name", CODECS)
def test_round_is_the_nearest_point_of_the_grid(name):
    weights = torch.randn(ROWS, COLS)
    codec = CODECS[name]
    grid = codec.search(weights)
    scale, minimum = codec.scale_min(grid)
    assert scale.shape == minimum.shape == (ROWS, COLS // codec.sub_block)
    points = scale[..., None, None] * torch.tensor(codec.levels, dtype=torch.float32) - minimum[..., None, None]
    nearest = (points - weights.view(*scale.shape, -1, 1)).abs().amin(-1).view(ROWS, COLS)
    error = (codec.dequantize(grid, codec.round(weights, grid)) - weights).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-6)


def test_a_grid_made_by_hand_is_stored():
    codec = CODECS["Q4_K"]
    grid = Grid(
        torch.full((1, 1), 0.5).half(),
        torch.full((1, 1), 0.25).half(),
        torch.arange(8, dtype=torch.int16).view(1, 8) * 9,
        torch.arange(8, dtype=torch.int16).view(1, 8) * 7,
    )
    codes = (torch.arange(256) % 16).to(torch.uint8).view(1, 256)
    read = libgguf.dequantize_rows(codec.pack(grid, codes).numpy(), ggml_type("Q4_K").id)
    block = np.arange(256) // 32
    np.testing.assert_array_equal(read[0], 0.5 * 9 * block * (np.arange(256) % 16) - 0.25 * 7 * block)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_refused(bad):
    weights = torch.randn(2, 256)
    weights[1, 3] = bad
    with pytest.raises(FormatError, match="NaN or infinity"):
        encode("Q4_K", weights)


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "Q4_K", "F16"])
def test_scales_that_overflow_are_refused(name):
    with pytest.raises(FormatError, match="too large"):
        encode(name, torch.randn(2, 256) * 1e30)


@pytest.mark.parametrize(
    ("weights", "importance", "message"),
    [
        (torch.zeros(2, 250), None, "whole number"),
        (torch.zeros(256), None, "float32 matrix"),
        (torch.zeros(2, 256, dtype=torch.float16), None, "float32 matrix"),
        (torch.zeros(2, 256), torch.ones(255), "one value a column"),
        (torch.zeros(2, 256), torch.full((256,), -1.0), "negative"),
        (torch.zeros(2, 256), torch.full((256,), torch.nan), "NaN"),
    ],
)
def test_what_does_not_fit_is_refused(weights, importance, message):
    with pytest.raises(FormatError, match=message):
        encode("Q4_K", weights, importance)


def test_a_grid_of_another_type_is_refused():
    grid, codes = CODECS["Q6_K"].choose(torch.randn(1, 256), None)
    with pytest.raises(FormatError, match="lacks"):
        CODECS["Q4_K"].pack(grid, codes)


def test_truncated_data_is_refused():
    with pytest.raises(FormatError, match="144 bytes"):
        decode("Q4_K", torch.zeros(1, 143, dtype=torch.uint8), 256)


ON_A_GPU = itertools.product(CODECS, DISTRIBUTIONS, IMPORTANCES) if torch.cuda.is_available() else ()


@pytest.mark.parametrize(("name", "distribution", "importance"), list(ON_A_GPU))
def test_bytes_on_a_gpu_equal_ggml(name, distribution, importance):
    g = generator(name, distribution, importance)
    weights, column_importance = DISTRIBUTIONS[distribution](g), IMPORTANCES[importance](g)
    codec = CODECS[name]
    grid, codes = codec.choose(weights.cuda(), None if column_importance is None else column_importance.cuda())
    if all_finite(grid):
        np.testing.assert_array_equal(
            codec.pack(grid, codes).cpu().numpy(), ggml_bytes(name, weights, column_importance)
        )
    else:  # encode refuses these, on either device; only NaNs may look different
        assert not all_finite(codec.search(weights, column_importance))


def all_finite(grid: Grid) -> bool:
    return all(bool(part.isfinite().all()) for part in (grid.d, grid.dmin) if part is not None)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_both_ways_on_a_cpu_give_the_same_bytes(name: str, weighted: bool) -> None:
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(70, 512, generator=g) * torch.rand(70, 1, generator=g)
    importance = torch.rand(512, generator=g) if weighted else None
    ours, native = (encode(name, weights, importance, native=native) for native in (False, True))
    assert torch.equal(ours, native)
