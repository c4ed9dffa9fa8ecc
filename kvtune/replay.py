"""Replay: what a model looks at when it reads a context again behind itself (KVzip)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvtune.attention import NAME
from kvtune.errors import UsageError
from kvtune.models import facts
from kvtune.placement import input_device
from kvtune.view import LOGITS
from kvtune.watched import Sight, going_on

ASK = "\n\nRepeat the previous context exactly:\n\n"
CHUNK = 2048  # tokens of the context that are read again at once
LEAD = 8  # tokens of the chunk before that lead in
SINKS = 4  # tokens at the start that always take their part of the attention
NEVER_SCORED = 2.0  # above any score, since attention is one at most


def ask(tokenizer: Any, text: str = ASK) -> list[int]:
    """The tokens that ask for a repetition."""
    found: list[int] = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return found


@torch.no_grad()
def replayed(
    model: Any,
    tokens: Tensor,
    layers: Sequence[Any],
    held: Mapping[int, tuple[Tensor, Tensor]],
    prompt: Sequence[int],
    *,
    prefix: int = 0,
    chunk: int = CHUNK,
) -> dict[int, Tensor]:
    """The most attention [B, H, T] that each token of a context got while it was read again
    (KVzip, arXiv:2505.23416), layer by layer.

    Chunk by chunk the model reads `prompt`, the last tokens of the chunk before, and the chunk,
    behind the whole dense context. On each layer a softmax is over the first tokens of the context,
    the chunk as it is cached, and what is read; the score of a token is the most that it gets of
    all that is read, over the query heads of its kv head. What was read is forgotten again. The
    first `prefix` tokens (those of a system prompt, four at least) are not read again and get
    `NEVER_SCORED`, more than any other.

    Args:
        tokens: [B, T], unpadded.
        layers: the cache layers of the dense context, which are left as they are.
        held: keys and values [B, H, T, D] of those of them that are scored.

    Raises:
        UsageError: context and replay together exceed the model's positions.
    """
    length, first = tokens.shape[1], max(prefix, SINKS)
    most, limit = length + len(prompt) + LEAD + chunk, facts(model.config).max_positions
    if most > limit and (chunk := chunk - (most - limit)) < LEAD:
        what = f"A replay of {length:,} tokens behind themselves exceeds the model's "
        raise UsageError(f"{what}{limit:,} positions.", "Give a shorter context.")
    model.set_attn_implementation(NAME)
    scores = {
        index: keys.new_full(keys.shape[:3], NEVER_SCORED, dtype=_wide(keys))
        for index, (keys, _) in held.items()
    }
    asked = tokens.new_tensor([list(prompt)], device=input_device(model)).expand(len(tokens), -1)
    for start in range(first, length, chunk):
        end = min(length, start + chunk)

        def show(layer: int, sight: Sight, own: slice = slice(start, end)) -> None:
            scores[layer][:, :, own] = peaks(sight, own, SINKS)

        lead = tokens[:, max(first, start - LEAD) : start]
        again = torch.cat([asked, lead.to(asked), tokens[:, start:end].to(asked)], 1)
        model(again, past_key_values=going_on(layers, held, show), logits_to_keep=1)
    return scores


def peaks(sight: Sight, own: slice, sinks: int = SINKS) -> Tensor:
    """The most attention [B, H, c] that the keys of a slice get of queries [B, Hq, n, D].

    A softmax is over the first `sinks` keys, those of the slice, and the last n, which are the
    queries' own and seen up to each of them. A few queries at a time, in float32 at least.
    """
    query, wide = sight.query, _wide(sight.keys)
    heads, count, size = sight.keys.shape[1], query.shape[2], own.stop - own.start
    keys = torch.cat(
        [sight.keys[:, :, :sinks], sight.keys[:, :, own], sight.keys[:, :, -count:]], 2
    )
    across, grouped = keys.to(wide).transpose(-1, -2), query.unflatten(1, (heads, -1))
    best = keys.new_zeros(*keys.shape[:2], size, dtype=wide)
    step = max(1, LOGITS // (query.shape[0] * query.shape[1] * keys.shape[2]))
    for start in range(0, count, step):
        some = grouped[..., start : start + step, :].to(wide)
        rows = some.shape[-2]
        logits = some.flatten(2, 3) @ across * (sight.scale or query.shape[-1] ** -0.5)
        if sight.softcap is not None:
            logits = torch.tanh(logits / sight.softcap) * sight.softcap
        ones = torch.ones(rows, keys.shape[2], dtype=torch.bool, device=keys.device)
        future = ones.triu(sinks + size + start + 1).repeat(some.shape[2], 1)
        weights = logits.masked_fill(future, float("-inf")).softmax(-1)
        best = best.maximum(weights[..., sinks : sinks + size].amax(-2))
    return best


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
