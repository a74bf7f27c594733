"""Log-likelihoods of many continuations from packed rows: beginnings once, the head only where something is scored."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.evals.tasks.packing import Prompt, Row, pack

# whatever a model's arithmetic, a mask or positions that it does not heed are off by more than these (nats)
_TOLERANCE = {torch.float32: 1e-3}
_ROUGH = 0.5
_PROBED_TOKENS = 48

Request = tuple[Sequence[int], Sequence[int]]  # context, continuation


def packed_scores(
    model: nn.Module, requests: Sequence[Request], *, longest: int, row_tokens: int
) -> list[tuple[float, bool]]:
    """For each request, the log-probability (nats) of its continuation after its context, and whether every token of it is
    the likeliest. longest: positions that the model has; what is beyond is dropped from the left, as lm-eval does.
    """
    prompts, owners = _prompts(requests, longest)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    for row in pack(prompts, row_tokens):
        for index, logs in _row_logs(model, row).items():
            for owner in owners[index]:
                continuation = torch.tensor(list(requests[owner][1]), device=logs.device)
                own = logs[-len(continuation) :]
                greedy = bool((own.argmax(-1) == continuation).all())
                found[owner] = (float(own.gather(1, continuation[:, None]).sum()), greedy)
    return found


def heeds_packing(model: nn.Module, requests: Sequence[Request], longest: int) -> bool:
    """Whether packed rows give what prompts on their own give: not where tokens see a window only, where states are
    recurrent, or where positions are counted by the model itself. The first requests, shortened, tell."""
    parameters = inspect.signature(model.forward).parameters
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    if kinds != {"full_attention"} or windowed or not {"position_ids", "logits_to_keep"} <= set(parameters):
        return False
    tokens = [tuple([*context, *continuation][:_PROBED_TOKENS]) for context, continuation in requests[:3]]
    # the first two again with another end: groups of two with something in common, one after the other
    prompts = [Prompt((*own, end), max(0, len(own) - 2)) for own in tokens for end in (own[0], own[-1])]
    prompts = [prompt for prompt in prompts if len(prompt.tokens) <= longest]
    dtype = next(model.parameters()).dtype
    for row in pack(prompts, len(prompts) * (_PROBED_TOKENS + 1)):
        for index, logs in _row_logs(model, row).items():
            alone = model(torch.tensor([prompts[index].tokens], device=logs.device), use_cache=False).logits[0]
            expected = alone[prompts[index].scored :].log_softmax(-1)
            likely = expected.argmax(-1, keepdim=True)
            off = (logs.gather(1, likely) - expected.gather(1, likely)).abs().max()
            if not off <= _TOLERANCE.get(dtype, _ROUGH):
                return False
    return True


def _prompts(requests: Sequence[Request], longest: int) -> tuple[list[Prompt], list[list[int]]]:
    """The different inputs among the requests, and which requests each serves: continuations of one token share theirs."""
    prompts: dict[tuple[int, ...], int] = {}
    scored: list[int] = []
    owners: list[list[int]] = []
    for owner, (context, continuation) in enumerate(requests):
        tokens = tuple([*context, *continuation][-(longest + 1) :][:-1])
        index = prompts.setdefault(tokens, len(prompts))
        start = len(tokens) - len(continuation)
        if index == len(owners):
            owners.append([])
            scored.append(start)
        owners[index].append(owner)
        scored[index] = min(scored[index], start)
    return [Prompt(tokens, scored[index]) for tokens, index in prompts.items()], owners


def _row_logs(model: nn.Module, row: Row) -> dict[int, Tensor]:
    """Log-probabilities [scored positions, vocabulary] of each prompt of a row, in the model's dtype."""
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    sees = row.mask().to(device)[None, None]
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
    wanted = torch.cat([torch.arange(start, stop) for start, stop in row.places.values()])
    logits = model(
        input_ids=torch.tensor([row.tokens], device=device),
        position_ids=torch.tensor([row.positions], device=device),
        attention_mask=mask,
        logits_to_keep=wanted.to(device),
        use_cache=False,
    ).logits[0]
    logs, at = {}, 0
    for index, (start, stop) in row.places.items():
        logs[index] = logits[at : at + stop - start].log_softmax(-1)
        at += stop - start
    return logs
