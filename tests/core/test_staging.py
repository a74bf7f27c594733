"""Bytes on their way to a GPU and back."""

from __future__ import annotations

import pytest
import torch

from lowbit.core import staging

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("piece", [1000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (123, 457)])
def test_tensors_come_back_as_they_went(
    shape: tuple[int, ...], dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_PIECE", piece)
    tensor = (torch.randn(shape) * 100).to(dtype)
    device = torch.device("cuda")
    with staging.Upload(device) as upload:
        there = upload.tensor(tensor.t())
    assert there.is_cuda
    assert there.shape == tensor.t().shape
    assert torch.equal(there.cpu(), tensor.t())
    changed = there + 1
    ready = torch.cuda.current_stream().record_event()
    back = staging.Download(device).tensor(changed.t(), ready)
    assert not back.is_cuda
    assert torch.equal(back, tensor + 1)


def test_what_fill_raises_is_raised_and_the_next_tensor_still_arrives() -> None:
    def fail(start: int, piece: torch.Tensor) -> None:
        raise OSError("gone")

    with staging.Upload(torch.device("cuda")) as upload:
        with pytest.raises(OSError, match="gone"):
            upload.filled(10 * staging._PIECE, fail)
        assert torch.equal(upload.tensor(torch.arange(5)).cpu(), torch.arange(5))
