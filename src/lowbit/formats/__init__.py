"""How the numbers are stored: one file each, which writes and reads its layout; imported when it is asked for.

Another package adds a format with an entry point in the group "lowbit.formats": its name, and "module:OBJECT" of an
object that follows lowbit.formats.layout.StoredFormat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.core.errors import FormatError
from lowbit.core.registry import Registry
from lowbit.formats.layout import StoredFormat

FORMATS = Registry(
    "format",
    {
        "gptq": "lowbit.formats.gptq:GPTQ",
        "gptq_v2": "lowbit.formats.gptq:GPTQ_V2",
        "compressed-tensors": "lowbit.formats.compressed_tensors:COMPRESSED_TENSORS",
        "awq": "lowbit.formats.awq:AWQ",
        "fp8": "lowbit.formats.fp8:FP8",
        "bitsandbytes": "lowbit.formats.bitsandbytes:BITSANDBYTES",
        "modelopt": "lowbit.formats.modelopt:MODELOPT",
        "bitsandbytes_double": "lowbit.formats.bitsandbytes:BITSANDBYTES_DOUBLE",
    },
    FormatError,
)


def get_format(name: str) -> StoredFormat:
    """The format called `name`. Raises FormatError for an unknown name, or an object that is not a format."""
    found = FORMATS.get(name)
    if not isinstance(found, StoredFormat):
        raise FormatError(f"format {name!r} of another package is not a format: parts of StoredFormat are missing")
    return found


def format_of(quantization_config: Mapping[str, Any]) -> StoredFormat:
    """The format of an existing `quantization_config` entry. Raises FormatError for one that lowbit does not read."""
    method = str(quantization_config.get("quant_method", "")).lower()
    if method == "gptq":
        return get_format(_gptq_version(quantization_config))
    if method == "bitsandbytes" and quantization_config.get("bnb_4bit_use_double_quant"):
        return get_format("bitsandbytes_double")
    if method in FORMATS.names():
        return get_format(method)
    raise FormatError(
        f"lowbit does not read checkpoints with quant_method {method!r}",
        hint=f"start from the unquantized checkpoint, or from one of: {', '.join(FORMATS.names())}",
    )


def _gptq_version(config: Mapping[str, Any]) -> str:
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise FormatError(f"lowbit reads gptq checkpoints of format gptq and gptq_v2, not {version!r}")
    return str(version)
