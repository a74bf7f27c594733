"""The smoke check's questions to a server: what it answers is written down here and judged where the weights are at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lowbit.runtimes.client import Client, RefusedError

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The opposite of hot is",
    "Once upon a time, there was a",
    "Two plus two equals",
    "The largest planet in the solar system is",
    "Python is a programming",
    "def add(a, b):\n    return",
    "The quick brown fox jumps over the lazy",
    "Monday, Tuesday, Wednesday,",
    "In 1969, the first man landed on the",
    "The chemical symbol for gold is",
    "Shakespeare wrote a play called Romeo and",
    "The sun rises in the",
    "A triangle has three",
    "Bread is made from flour, water and",
    "To be, or not to be, that is the",
    "The president of the United States lives in the White",
    "Roses are red, violets are",
    "The heart pumps blood through the",
    "import numpy as",
    "She opened the door and walked into the",
    "The Great Wall is in",
    "An apple a day keeps the doctor",
)
QUESTION = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]
STORY = "The old lighthouse keeper climbed the stairs every evening and lit the lamp for the ships at sea. "
TEXT_TOKENS = 48


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is as it should be, and what was seen."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Answers:
    """What a server said at temperature 0. next: the token after each of PROMPTS, as text. text: TEXT_TOKENS tokens after
    the first of them. chat: its answer to QUESTION, "" where it was not asked. long: the token after the long prompt.
    findings: what can be judged without the weights."""

    next: tuple[str, ...]
    text: str
    chat: str
    long: str
    findings: tuple[Finding, ...]


def ask(client: Client, *, long_prompt: str, too_long: str | None, chat: bool, specials: tuple[str, ...]) -> Answers:
    """Put all questions to a server. long_prompt: most of its context. too_long: more than that, None for a server that
    knows no limit. specials: texts of the tokenizer's special tokens, which no answer may show.

    Raises ServeError when the server cannot be reached any more; what it refuses is a finding.
    """
    following = tuple(_text(client, prompt, 1) for prompt in PROMPTS)
    text = _text(client, PROMPTS[0], TEXT_TOKENS)
    answer = _chat(client) if chat else ""
    findings = [*_checks(client, text, answer if chat else None, specials, too_long)]
    long = ""
    try:
        long = _text(client, long_prompt, 1)
    except RefusedError as error:
        findings.append(Finding("long prompt", False, error.message))
    return Answers(following, text, answer, long, tuple(findings))


def _checks(
    client: Client, text: str, answer: str | None, specials: tuple[str, ...], too_long: str | None
) -> Iterator[Finding]:
    repeated = _text(client, PROMPTS[0], TEXT_TOKENS)
    yield Finding("repeats itself", repeated == text, "the same answer twice at temperature 0" if repeated == text
                  else f"{text[:60]!r}, then {repeated[:60]!r}")  # fmt: skip
    yield _finding("streaming", lambda: _streaming(client, text))
    yield _finding("stop word", lambda: _stop_word(client, text))
    yield _finding("two at once", lambda: _two(client))
    if answer is not None:
        shown = [special for special in specials if special in answer]
        yield Finding("chat", bool(answer.strip()) and not shown,
                      f"special tokens in the answer: {', '.join(shown)}" if shown else repr(answer[:80]))  # fmt: skip
    if too_long is not None:
        yield _refuses(client, too_long)


def _finding(name: str, look: Callable[[], tuple[bool, str]]) -> Finding:
    try:
        return Finding(name, *look())
    except RefusedError as error:
        return Finding(name, False, error.message)


def _streaming(client: Client, text: str) -> tuple[bool, str]:
    body = {"prompt": PROMPTS[0], "max_tokens": TEXT_TOKENS, "temperature": 0}
    pieces = [piece for chunk in client.stream("/completions", body) for piece in _pieces(chunk)]
    streamed = "".join(pieces)
    if streamed != text:
        return False, f"the stream says {streamed[:60]!r}, the answer {text[:60]!r}"
    # a server may put a few tokens into one piece, but must not keep the answer back until it is whole
    return len(pieces) > TEXT_TOKENS // 8, f"{len(pieces)} pieces, the same text"


def _pieces(chunk: dict[str, object]) -> list[str]:
    choices = chunk.get("choices")
    return [str(choice.get("text") or "") for choice in choices] if isinstance(choices, list) else []


def _stop_word(client: Client, text: str) -> tuple[bool, str]:
    words = [word for word in text.split() if word.isalnum() and len(word) > 2]
    if len(words) < 2:
        return True, "the answer has too few words to stop at one"
    word = words[len(words) // 2]
    choice = client.complete(PROMPTS[0], max_tokens=TEXT_TOKENS, temperature=0, stop=[word])["choices"][0]
    expected = text[: text.index(word)]
    got = str(choice["text"])
    # servers differ in whether the stop word itself is shown
    reason = choice.get("finish_reason")
    ok = got.removesuffix(word) == expected and reason == "stop"
    return ok, f"stopped at {word!r}" if ok else f"{got[:60]!r} ({reason}), expected {expected[:60]!r}"


def _two(client: Client) -> tuple[bool, str]:
    alone = [_text(client, prompt, 8) for prompt in PROMPTS[:2]]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda prompt: _text(client, prompt, 8), PROMPTS[:2]))
    # sums in another order may change a later token, never whose answer it is
    ok = all(two[:4] == one[:4] for one, two in zip(alone, together, strict=True))
    return ok, "both as alone" if together == alone else f"alone {alone}, together {together}"


def _refuses(client: Client, prompt: str) -> Finding:
    try:
        client.complete(prompt, max_tokens=1, temperature=0)
    except RefusedError as error:
        return Finding("too long a prompt", 400 <= error.status < 500, f"refused with {error.status}")
    return Finding("too long a prompt", False, "was answered, so a part of it was dropped")


def _text(client: Client, prompt: str, tokens: int) -> str:
    return str(client.complete(prompt, max_tokens=tokens, temperature=0)["choices"][0]["text"])


def _chat(client: Client) -> str:
    try:
        answer = client.chat(QUESTION, max_tokens=TEXT_TOKENS, temperature=0)
    except RefusedError:
        return ""
    return str(answer["choices"][0]["message"].get("content") or "")
