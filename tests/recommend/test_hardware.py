"""Hardware by name, in words, and as this machine tells of itself."""

from __future__ import annotations

import pytest

from lowbit.core.errors import RecipeError
from lowbit.recommend.detect import cpu_features, detect
from lowbit.recommend.hardware import by_device_name, parse_hardware, table


def test_the_table_is_large_and_sane() -> None:
    rows = table()
    assert len(rows) >= 60
    for row in rows.values():
        assert row.source
        assert 2**31 <= row.memory <= 2**40
        assert 5e9 <= row.bandwidth <= 1e13
        assert row.cc == 0 or 5 <= row.cc <= 13
        assert (row.cc > 0) == (row.vendor == "nvidia")
    assert {row.kind for row in rows.values()} == {"gpu", "apple", "cpu", "board"}


@pytest.mark.parametrize(
    ("text", "row", "devices", "memory"),
    [
        ("rtx4090", "rtx4090", 1, 24),
        ("RTX 4090", "rtx4090", 1, 24),
        ("GeForce RTX 4090", "rtx4090", 1, 24),
        ("h100x2", "h100x2", 2, 80),
        ("2xh100", "h100x2", 2, 80),
        ("mi300x8", "mi300xx8", 8, 192),
        ("rx7900xtx", "rx7900xtx", 1, 24),
        ("rx7900xtxx2", "rx7900xtxx2", 2, 24),
        ("raspberry-pi-5-4g", "raspberrypi5-4g", 1, 4),
        ("cpu:8c,32g", "cpu:8c,32g", 1, 32),
        ("board:4g", "board:4g", 1, 4),
    ],
)
def test_names_are_understood(text: str, row: str, devices: int, memory: int) -> None:
    found = parse_hardware(text)
    assert (found.id, found.devices, found.memory) == (row, devices, memory * 2**30)


def test_hardware_in_words() -> None:
    cpu = parse_hardware("cpu:16c,64g,90gbs,avx2,avx512")
    assert (cpu.kind, cpu.cores, cpu.bandwidth, cpu.features) == ("cpu", 16, 90e9, ("avx2", "avx512"))
    gpu = parse_hardware("gpu:24g,cc8.9,1000gbs")
    assert (gpu.kind, gpu.vendor, gpu.cc, gpu.bandwidth, gpu.place) == ("gpu", "nvidia", 8.9, 1e12, "gpu")
    assert parse_hardware("gpu:64g,amd").cc == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtx4099", "did you mean 'rtx"),
        ("rtx4090x0", "not in the table"),
        ("cpu:8c", "says no memory"),
        ("cpu:8c,32g,avx3", "'avx3' is not understood"),
        ("tpu:8g", "unknown word"),
        ("cpu:8,32g", "says no memory"),
    ],
)
def test_what_is_not_understood_is_named(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_hardware(text)
    assert message in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
    ],
)
def test_drivers_names_are_found(name: str, row: str) -> None:
    found = by_device_name(name)
    assert found is not None
    assert found.id.split("-")[0] == row
    assert by_device_name("NVIDIA Quadro FX 1700") is None


def test_instruction_sets() -> None:
    x86 = "model name\t: x\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_tile\n"
    assert cpu_features(x86) == ("avx2", "avx512", "vnni", "amx")
    assert cpu_features("Features\t: fp asimd bf16\n") == ("neon", "bf16")
    assert cpu_features("Serial: avx2\n") == ()


def test_this_machine() -> None:
    here = detect()
    assert here.memory > 2**28
    assert here.bandwidth > 1e8
    assert here.flops > 1e8
    assert here.measured or here.kind == "gpu"
    # the name it gives itself is one that can be typed elsewhere
    assert parse_hardware(here.id).kind in ("cpu", "board", "gpu")


def test_gpus_that_nvml_tells_of(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [("NVIDIA H100 80GB HBM3", 79 * 2**30, 9.0)] * 2
    monkeypatch.setattr("lowbit.recommend.detect._nvml", lambda: found)
    here = detect()
    assert (here.id, here.devices, here.memory, here.cc) == ("h100x2", 2, 79 * 2**30, 9.0)
    monkeypatch.setattr("lowbit.recommend.detect._nvml", lambda: [("NVIDIA Future 9", 2**36, 15.0)])
    unknown = detect()
    assert (unknown.kind, unknown.cc, unknown.memory) == ("gpu", 15.0, 2**36)
    assert "assumed" in unknown.source
