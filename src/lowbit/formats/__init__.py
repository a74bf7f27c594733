"""How the numbers are stored: one file each, which writes and reads its layout; imported when it is asked for.

Another package adds a format with an entry point in the group "lowbit.formats": its name, and "module:OBJECT" of an
object that follows lowbit.formats.layout.StoredFormat.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from lowbit.core.errors import FormatError, did_you_mean
from lowbit.formats.layout import StoredFormat

FORMATS = {
    "gptq": "lowbit.formats.gptq:GPTQ",
    "gptq_v2": "lowbit.formats.gptq:GPTQ_V2",
    "compressed-tensors": "lowbit.formats.compressed_tensors:COMPRESSED_TENSORS",
}
GROUP = "lowbit.formats"


def format_names() -> dict[str, str]:
    """Name -> "module:OBJECT" of every format, other packages' included; lowbit's own names cannot be replaced."""
    return {entry.name: entry.value for entry in entry_points(group=GROUP)} | FORMATS


def get_format(name: str) -> StoredFormat:
    """The format called `name`. Raises FormatError for an unknown name, or one whose package is not importable."""
    names = format_names()
    if name not in names:
        raise FormatError(
            f"there is no format {name!r}{did_you_mean(name, names)}", hint=f"formats: {', '.join(sorted(names))}"
        )
    module, _, attribute = names[name].partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise FormatError(f"format {name!r} ({names[name]}) cannot be loaded: {error}") from error
    if not isinstance(found, StoredFormat):
        raise FormatError(f"format {name!r} ({names[name]}) is not a format")
    return found


def format_of(quantization_config: Mapping[str, Any]) -> StoredFormat:
    """The format of an existing `quantization_config` entry. Raises FormatError for one that lowbit does not read."""
    method = str(quantization_config.get("quant_method", "")).lower()
    if method == "gptq":
        return get_format(_gptq_version(quantization_config))
    if method in format_names():
        return get_format(method)
    raise FormatError(
        f"lowbit does not read checkpoints with quant_method {method!r}",
        hint=f"start from the unquantized checkpoint, or from one of: {', '.join(sorted(format_names()))}",
    )


def _gptq_version(config: Mapping[str, Any]) -> str:
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise FormatError(f"lowbit reads gptq checkpoints of format gptq and gptq_v2, not {version!r}")
    return str(version)
