"""The rows of quality.py: lowbit with these arguments, or a script of _peers with those."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ours:
    """A row made by lowbit.quantize with these arguments besides the common ones."""

    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """How the artifact's name ends: a k-quant is one file, others are directories."""
        return ".gguf" if self.arguments.get("method") in KQUANTS else ""


@dataclass(frozen=True)
class Peer:
    """A row made by a script of _peers in a side environment."""

    environment: str
    script: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Here:
    """A row made by a script of _peers in lowbit's own environment, which has the peer as a dependency."""

    script: str


# of methods that are not integers in groups: theirs are the preset's own
OWN: dict[str, Any] = {"bits": None, "group_size": None, "symmetric": None}
# of files of these types; with an importance matrix their bytes are those of llama-quantize (tests/methods/kquants)
KQUANTS = ("q4_k_m", "q3_k_s")
# 4-bit floats
FLOATS = ("mxfp4", "nvfp4")

ROWS: dict[str, Ours | Peer | Here] = {
    "ours:rtn": Ours({"method": "rtn"}),
    "ours:rtn-min-max": Ours({"method": "rtn", "options": {"search": False}}),
    "ours:gptq": Ours({"method": "gptq"}),
    "ours:gptq-fast": Ours({"method": "gptq", "effort": "fast"}),
    "ours:gptq-gptq-format": Ours({"method": "gptq", "format": "gptq"}),
    "ours:gptq-plain": Ours({"method": "gptq", "options": {"search": False, "refine": 0}}),
    "ours:gptq-no-act-order": Ours({"method": "gptq", "options": {"act_order": "none"}}),
    "ours:gptaq": Ours({"method": "gptq", "options": {"asymmetric": 0.25}}),
    "ours:awq": Ours({"method": "awq"}),
    "ours:autoround": Ours({"method": "autoround"}),
    "ours:best": Ours({"method": "gptq", "effort": "best"}),
    "ours:best-codes": Ours({"method": "gptq", "effort": "best", "tune_codes": True}),
    **{f"ours:{name}": Ours({"method": name, **OWN}) for name in ("w8a8", "int8_sq", "fp8", "nf4", *FLOATS)},
    **{f"ours:{name}-gptq": Ours({"method": "gptq", **OWN, "kind": name}) for name in FLOATS},
    **{f"ours:{name}-best": Ours({"method": name, **OWN, "effort": "best"}) for name in FLOATS},
    **{
        f"ours:{name}-{row}": Ours({"method": name, **OWN, "options": {"refine": row}})
        for name in KQUANTS
        for row in ("imatrix", "hessian")
    },
    **{f"ours:{name}-best": Ours({"method": name, **OWN, "effort": "best"}) for name in KQUANTS},
    "llmcompressor:rtn": Peer("llm-compressor", "llmcompressor_rtn.py"),
    "llmcompressor:gptq": Peer("llm-compressor", "llmcompressor_gptq.py"),
    "llmcompressor:gptq-no-act-order": Peer("llm-compressor", "llmcompressor_gptq.py", ("--actorder", "none")),
    "llmcompressor:awq": Peer("llm-compressor", "llmcompressor_awq.py"),
    "llmcompressor:smoothquant": Peer(
        "llm-compressor", "llmcompressor_smoothquant.py", ("--bits", "8", "--group-size", "0")
    ),
    "llmcompressor:smoothquant-gptq": Peer(
        "llm-compressor", "llmcompressor_smoothquant.py", ("--bits", "8", "--group-size", "0", "--then", "gptq")
    ),
    "llmcompressor:fp8": Peer("llm-compressor", "llmcompressor_scheme.py", ("--scheme", "FP8_DYNAMIC")),
    "llmcompressor:nvfp4": Peer("llm-compressor", "llmcompressor_scheme.py", ("--scheme", "NVFP4A16")),
    "llmcompressor:mxfp4": Peer("llm-compressor", "llmcompressor_scheme.py", ("--scheme", "MXFP4A16")),
    "llmcompressor:nvfp4-gptq": Peer("llm-compressor", "llmcompressor_scheme.py", ("--scheme", "NVFP4A16", "--gptq")),
    "bitsandbytes:nf4": Here("bitsandbytes_nf4.py"),
    "autoround:signround": Peer("auto-round", "autoround.py"),
    "gptqmodel:gptq": Peer("gptqmodel", "gptqmodel_gptq.py"),
    "gptqmodel:gptq-static": Peer("gptqmodel", "gptqmodel_gptq.py", ("--actorder", "static")),
    "gptqmodel:gptaq": Peer("gptqmodel", "gptqmodel_gptq.py", ("--gptaq",)),
    # it has zero points only
    "hqq:hqq": Peer("hqq", "hqq_quantize.py", ("--no-sym",)),
    "hqq:hqq-axis-0": Peer("hqq", "hqq_quantize.py", ("--no-sym", "--axis", "0")),
}
