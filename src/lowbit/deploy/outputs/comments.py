"""Why a line is there, for those who review manifests: comments above lines that would be asked about."""

from __future__ import annotations

import re

_WHY = {
    "enableServiceLinks: false": "a Service called vllm would set VLLM_PORT, which vLLM reads as its own",
    "fsGroupChangePolicy: OnRootMismatch": "the default changes the owner of every file of a volume at every start",
    "progressDeadlineSeconds:": "above pulling the image and loading the model",
    "maxSurge: 0": "a GPU that the old pod holds is not there for a new one",
    "preStop:": "answers until every endpoint has forgotten the pod",
    "startupProbe:": "as long as loading may take; until it succeeds the other probes wait",
    "terminationGracePeriodSeconds:": "longer than preStop and finishing what is being answered or written",
    "medium: Memory": "counts into the memory limit",
    "action: Ignore": "an eviction is no fault of the run, and costs the block in hand",
    "onExitCodes:": "asked wrongly, or not good enough: it would be the same next time",
    "name: evicted": "podFailurePolicy makes this reason of an eviction, which is no fault of the run",
    "backoffLimit: 0": "without one of them the others hang: all begin again, from the journal",
    "restartStrategy: BlockingRecreate": "no pod of the last try may still write when the next one begins",
    "publishNotReadyAddresses: true": "pods look for each other before they are ready",
    "cidr: 169.254.20.10/32": "NodeLocal DNSCache",
    "restartPolicy: RecreateGroupOnPodRestart": "a group has one state: with one pod gone the others hang",
    "unhealthyPodEvictionPolicy: AlwaysAllow": "a pod that never gets ready must not keep a node from being drained",
}
_LINE = re.compile(r"( *)(- )?(.*)")


def commented(text: str) -> str:
    """YAML, or a chart's template, with comments. Text in blocks ("|") is data and stays as it is."""
    lines: list[str] = []
    block: int | None = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent <= block:
            block = None
        if block is None:
            lines += _comment(line)
            block = indent if line.rstrip().endswith((": |", "- |")) else None
        lines.append(line)
    return "\n".join(lines) + "\n"


def _comment(line: str) -> list[str]:
    match = _LINE.fullmatch(line)
    if match is None:
        return []
    space, _, content = match.groups()
    why = next((why for start, why in _WHY.items()
                if content.startswith(start) and (start.endswith(":") or content == start)), None)  # fmt: skip
    return [] if why is None else [f"{space}# {why}"]
