"""The smoke check: a runtime serves the artifact, answers a few questions, and is held against the dequantized weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.api.serve import plan, serving
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.gguf import GgufCheckpoint
from lowbit.core.contracts import Checkpoint
from lowbit.core.progress import Progress, Silent
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.tokenizer import load_tokenizer
from lowbit.formats.reader import open_artifact
from lowbit.runtimes.artifact import Artifact, read_artifact
from lowbit.runtimes.description import ServeOptions
from lowbit.runtimes.machine import Machine
from lowbit.runtimes.smoke import PROMPTS, QUESTION, STORY, Answers, Finding, ask

CONTEXT = 1024
# share of prompts whose next token has to be the weights' own, or as good as it; see _nearly
_AGREEMENT = 0.9
# nats: by how much less likely a token may be that counts as good as the likeliest. 16-bit arithmetic moves logits by
# some hundredths; 8-bit or 4-bit activations by tenths (docs/serving.md)
_CLOSE, _CLOSE_ACTIVATIONS = 0.25, 1.0
# nats a token: fluent text of a small model has 0.5 to 2, uniform noise over 32,000 tokens has 10
_GARBAGE = 4.0


@dataclass(frozen=True)
class CheckReport:
    """passed: every finding is. agreement: share of PROMPTS after which the runtime's next token is the dequantized
    weights' likeliest. seconds: from the start of the runtime to its first completion."""

    artifact: str
    runtime: str
    passed: bool
    agreement: float
    seconds: float
    answer: str
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def check(
    model: str | Path,
    *,
    runtime: str | None = None,
    device: str = "auto",
    program: Path | None = None,
    patience: float = 600.0,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Serve `model`, ask fixed prompts at temperature 0, and compare with its dequantized weights in float32.

    Checks that it starts, that next tokens agree, that text is no garbage, that streams, stop words, chats, long and too
    long prompts and two requests at once are answered as they should. Raises ServeError when the runtime does not start,
    LowbitError subclasses for what cannot be read; a failed check is in the report.
    """
    listener = progress or Silent()
    listener.start("check", 3)
    context = min(_longest(model) or CONTEXT, CONTEXT)
    options = ServeOptions(port=0, context=context, parallel=2, tensor_parallel=0, name="artifact")
    planned = plan(model, runtime=runtime, options=options, device=device, program=program, machine=machine)
    checkpoint = _dense(planned.artifact)
    tokenizer = load_tokenizer(checkpoint)
    chats = bool(getattr(tokenizer, "chat_template", None))
    # transformers' own server has no limit
    too_long = None if planned.choice.runtime.name == "transformers" else _prompt_of(tokenizer, context + 64)
    long_prompt = _prompt_of(tokenizer, context * 3 // 4)
    listener.advance()
    with serving(planned, patience=patience) as server:
        seconds = server.ready_seconds
        answers = ask(planned.client, long_prompt=long_prompt, too_long=too_long, chat=chats,
                      specials=tuple(tokenizer.all_special_tokens))  # fmt: skip
    listener.advance()
    weights = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    agreement, compared = _compare(weights, tokenizer, planned.artifact, answers, long_prompt, chats)
    starts = Finding("starts", True, f"a completion after {seconds:.1f} s")
    findings = (starts, *compared, *answers.findings)
    listener.advance()
    return CheckReport(
        artifact=str(model),
        runtime=planned.choice.runtime.name,
        passed=all(finding.ok for finding in findings),
        agreement=agreement,
        seconds=seconds,
        answer=PROMPTS[0] + answers.text,
        findings=findings,
    )


def _longest(model: str | Path) -> int:
    """The longest context of a local model, 0 when it is unknown or not local."""
    return read_artifact(model).context if Path(model).exists() else 0


def _dense(artifact: Artifact) -> Checkpoint:
    if artifact.format == "gguf":
        return GgufCheckpoint(Path(artifact.location), dtype=torch.float32)
    return open_artifact(open_checkpoint(artifact.location), torch.float32)


def _prompt_of(tokenizer: Any, tokens: int) -> str:
    """Some `tokens` tokens of plain text."""
    each = len(tokenizer(STORY, add_special_tokens=False)["input_ids"])
    return (STORY * max(1, tokens // each)).strip()


def _compare(
    model: StreamedModel, tokenizer: Any, artifact: Artifact, answers: Answers, long_prompt: str, chats: bool
) -> tuple[float, list[Finding]]:
    """Judge the answers by the weights: share of next tokens that are the likeliest, and findings."""
    close = _CLOSE_ACTIVATIONS if any(_rounds_activations(label) for label in artifact.labels) else _CLOSE
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    text = tokenizer(PROMPTS[0] + answers.text)["input_ids"]
    chat = (
        tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
        if chats
        else []
    )
    long = tokenizer(long_prompt)["input_ids"]
    *rows, scores, after_template, after_long = _log_probs(model, [[*prompts, text, chat or [0]], [long]])
    expected = [row[-1] for row in rows]
    exact = [_says(tokenizer, row, said, 0.0) for row, said in zip(expected, answers.next, strict=True)]
    near = [_says(tokenizer, row, said, close) for row, said in zip(expected, answers.next, strict=True)]
    same = f"{sum(exact)}/{len(exact)} as the dequantized weights, {sum(near)} within {close} nats"
    findings = [Finding("next tokens", sum(near) >= _AGREEMENT * len(near), same)]
    told = scores[:-1].gather(1, torch.tensor(text)[1:, None])[len(prompts[0]) - 1 :]
    surprise = -told.mean().item() if len(told) else float("inf")
    seen = f"{surprise:.2f} nats a token under the weights: {answers.text[:60]!r}"
    findings.append(Finding("no garbage", surprise < _GARBAGE, seen))
    if answers.long:
        # 16-bit positions far from the start differ more than those near it
        fits = _says(tokenizer, after_long[-1], answers.long, max(close, 0.5))
        likeliest = tokenizer.decode([int(after_long[-1].argmax())])
        findings.append(Finding("long prompt", fits, f"{answers.long!r} next, the weights say {likeliest!r}"))
    if chats:
        findings.append(_chat_finding(after_template[-1], tokenizer, answers.chat, close))
    return sum(exact) / len(exact), findings


def _chat_finding(row: Tensor, tokenizer: Any, said: str, close: float) -> Finding:
    """The answer begins with the token that the template leads to, or with one as good. row: [vocabulary]."""
    likely = [i for i in row.topk(10).indices.tolist() if row.max() - row[i] <= close]
    begins = any(said.startswith(tokenizer.decode([i]).strip()) for i in likely)
    first = tokenizer.decode([int(row.argmax())])
    return Finding("chat template", begins, "the answer begins as the template leads to" if begins
                   else f"expected {first!r} first, got {said[:40]!r}")  # fmt: skip


def _says(tokenizer: Any, row: Tensor, text: str, close: float) -> bool:
    """Whether `text` is a token whose log-probability in `row` [vocabulary] is at most `close` below the highest."""
    likely = (row >= row.max() - close).nonzero()[:, 0].tolist()
    words = {tokenizer.decode([i], skip_special_tokens=True) for i in likely}
    # servers give a character of several tokens only when it is whole, and may leave out a leading space
    return (
        text in words or text.lstrip() in {word.lstrip() for word in words} or any("\ufffd" in word for word in words)
    )


def _rounds_activations(label: str) -> bool:
    name = label.split(" ")[0]
    return name.endswith("a8") or name in ("fp8", "mxfp4", "nvfp4") or name.startswith("Q")


@torch.no_grad()
def _log_probs(model: StreamedModel, batches: list[list[list[int]]]) -> list[Tensor]:
    """[tokens, vocabulary] log-probabilities of every sequence of every batch; each block is loaded once.

    Shorter sequences of a batch are filled up at their end, which a causal model does not see. Of a batch of one sequence
    only the last token's are computed, [1, vocabulary].
    """
    with model.outside():
        states = []
        for batch in batches:
            length = max(map(len, batch))
            states.append(model.embed(torch.tensor([ids + [0] * (length - len(ids)) for ids in batch])))
        for index in range(len(model.blocks)):
            with model.block(index) as block:
                states = [model.run_block(index, block, hidden) for hidden in states]
        rows = []
        for batch, hidden in zip(batches, states, strict=True):
            for ids, outputs in zip(batch, hidden, strict=True):
                wanted = outputs[len(ids) - 1 : len(ids)] if len(batch) == 1 else outputs[: len(ids)]
                rows.append(model.logits(wanted[None])[0].float().log_softmax(-1))
    return rows
