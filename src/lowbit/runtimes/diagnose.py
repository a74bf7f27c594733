"""What a runtime's last lines mean: known causes of its end, with the knob."""

from __future__ import annotations

import re
from collections.abc import Iterable

SIGKILL, SIGILL, SIGSEGV = 137, 132, 139
_QUOTED_LINES = 12
_MEMORY_HINT = "a smaller --context or --parallel, a scheme with fewer bits, or a machine with more memory"

_NOISE = re.compile(
    r"leaked (function|type|instance)|skipped remainder|nanobind|resource_tracker|\[shutdown\]|frame #\d+"
)

# (pattern over the last lines, cause, hint); the first that matches counts
_KNOWN = (
    (r"address already in use|couldn't bind|errno 98|failed to bind", "the port is taken", "choose another --port"),
    (
        r"out of memory|OutOfMemoryError|bad_alloc|cannot allocate memory|failed to allocate|unable to allocate"
        r"|No available memory for the cache blocks|can't allocate",
        "there is not enough memory",
        _MEMORY_HINT,
    ),
    (
        r"larger than the (available|maximum).*KV cache|KV cache is needed, which is larger|max seq len.*larger",
        "the context does not fit into the memory left for the KV cache",
        "a smaller --context, or more memory for it: --cache-gib on a CPU, --gpu-memory on a GPU",
    ),
    (
        r"scalar path not implemented|not implemented for '?(Half|BFloat16|Float)",
        "its kernel for these numbers does not exist for this dtype",
        "--dtype bfloat16, or --dtype float16",
    ),
    (
        r"no kernel image is available|failed to find a kernel|require CUDA tensors|no (suitable )?kernel|not compiled with",
        "it has no kernel for these numbers on this device",
        "another --runtime, or another scheme: lowbit methods",
    ),
    (r"unknown model architecture|architectures .* (not|are not) supported|not recognize this architecture",
     "it does not know this model family", "a newer release of the runtime, or --runtime transformers"),
    (r"Unknown quantization method|Unsupported quantization", "it does not know this format",
     "another --runtime, or lowbit convert to another format"),
    (r"Worker proc .* died unexpectedly|Engine core proc .* died unexpectedly", "one of its processes died", None),
    (r"No module named|ModuleNotFoundError|ImportError", "a package is missing in its environment",
     "see its last lines; lowbit env list shows the side environments"),
    (r"unrecognized arguments|no such option|unknown argument|error: argument", "it does not know one of its flags",
     "another release of the runtime is installed than lowbit was tested with; see docs/serving.md"),
)  # fmt: skip


def diagnose(lines: Iterable[str], exit_code: int) -> tuple[str, str | None]:
    """The last lines and the exit code of a runtime that ended -> (cause, hint)."""
    said = list(lines)
    for pattern, cause, hint in _KNOWN:
        line = next((line for line in said if re.search(pattern, line, re.IGNORECASE)), None)
        if line is not None:
            return f"{cause} ({line.strip()[:200]})", hint
    if exit_code == SIGKILL:
        return "it was killed, by somebody or by the kernel for lack of memory", _MEMORY_HINT
    if exit_code == SIGILL:
        return "its program needs instructions that this CPU lacks", "build or install it for this CPU"
    if exit_code == SIGSEGV:
        return "it crashed", "try another release of the runtime, or another --runtime"
    return "its last lines may say why", None


def quote(lines: Iterable[str]) -> str:
    """The last lines, indented, for the end of an error message, without what programs say of their own clean-up."""
    telling = [line for line in lines if line.strip() and not _NOISE.search(line)]
    return "".join(f"\n    {line[:300]}" for line in telling[-_QUOTED_LINES:])
