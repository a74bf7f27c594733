from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from lowbit.core import registry
from lowbit.core.errors import FormatError
from lowbit.formats import FORMATS, format_of, get_format


@pytest.mark.parametrize("name", FORMATS.names())
def test_every_name_gives_a_format_of_that_name(name):
    assert get_format(name).name == name


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(FormatError, match="did you mean 'compressed-tensors'") as error:
        get_format("compressed_tensors")
    assert "gptq_v2" in error.value.hint


def test_names_are_known_without_importing_the_formats():
    code = (
        "import sys, lowbit.formats as f; f.FORMATS.names(); print(*(m for m in sys.modules if 'lowbit.formats.' in m))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "lowbit.formats.layout"


def test_other_packages_add_formats_by_entry_point(monkeypatch):
    foreign = [EntryPoint("mine", "lowbit.formats.awq:AWQ", "lowbit.formats"), EntryPoint("bad", "json:dumps", "x")]
    monkeypatch.setattr(registry, "entry_points", lambda group: foreign if group == "lowbit.formats" else [])
    assert get_format("mine").name == "awq"
    with pytest.raises(FormatError, match="not a format"):
        get_format("bad")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "gptq", "format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "AWQ"}, "awq"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_use_double_quant": True}, "bitsandbytes_double"),
    ],
)
def test_existing_configurations_are_recognized(config, name):
    assert format_of(config).name == name


@pytest.mark.parametrize(
    "config", [{}, {"quant_method": "quip"}, {"quant_method": "gptq", "checkpoint_format": "marlin"}]
)
def test_what_is_not_read_is_a_format_error(config):
    with pytest.raises(FormatError, match="lowbit"):
        format_of(config)
