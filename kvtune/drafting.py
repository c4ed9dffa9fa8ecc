"""Drafting: what a small model says to a prompt, and what it looks at in it (SpecKV, SpecPC)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from kvtune.attention import NAME
from kvtune.errors import UsageError
from kvtune.models import facts
from kvtune.placement import input_device
from kvtune.shortening import peak, row_weights
from kvtune.view import Spot, View, looked
from kvtune.watched import Sight, going_on


def same_tokenizer(one: Any, other: Any) -> None:
    """Raises UsageError unless two tokenizers have one vocabulary, so that a model's tokens are
    what another one reads."""
    first, second = one.get_vocab(), other.get_vocab()
    if first == second:
        return
    names = sorted(first.keys() | second.keys())
    odd = [name for name in names if first.get(name) != second.get(name)]
    what = f"This is a draft with another tokenizer: {odd[0]!r} is another token there"
    told = f"{what}, one of {len(odd):,} that differ."
    raise UsageError(told, "Give a --draft of the model's own family.")


@torch.no_grad()
def drafted(draft: Any, tokens: Tensor, count: int) -> Tensor:
    """What a draft model says greedily behind tokens [B, T], at most `count` tokens [B, n].

    What ends a text ends it for one row; of several rows all go on, so that none is padded.
    """
    limit = facts(draft.config).max_positions
    if tokens.shape[1] + count > limit:
        what = f"{tokens.shape[1]:,} tokens of prompt and {count:,} that are drafted exceed the "
        raise UsageError(f"{what}draft's {limit:,} positions.", "Give a shorter prompt.")
    end = draft.generation_config.eos_token_id
    ends = [x for x in (end if isinstance(end, list) else [end]) if x is not None]
    config = GenerationConfig(
        max_new_tokens=count,
        min_new_tokens=count if len(tokens) > 1 else 0,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    given = tokens.to(input_device(draft))
    made = draft.generate(given, attention_mask=torch.ones_like(given), generation_config=config)
    new: Tensor = made[:, tokens.shape[1] :].to(tokens.device)
    return new


@torch.no_grad()
def glanced(draft: Any, tokens: Tensor, ahead: Tensor, window: int, skip: int) -> Tensor:
    """The most attention [T] that the tokens [1, T] of a prompt get in a draft model (SpecPC,
    arXiv:2506.08373): of its last `window` queries, and of tokens [1, n] behind it.

    Over all heads of all layers but the first `skip`. All but these rows is read plainly; no more
    than the rows of one layer is held at once.

    Raises:
        UsageError: the draft has no layer to be asked.
    """
    asked = [i for i in facts(draft.config).compressible() if i >= skip]
    if not asked:
        count = len(facts(draft.config).layers)
        what = f"The first {skip} layers of the draft are skipped, and it has {count}"
        raise UsageError(f"{what}.", "Give another --draft, or a smaller skip in [prefill].")
    draft.set_attn_implementation(NAME)
    length = tokens.shape[1]
    before = length - min(window, length - 1)
    whole = torch.cat([tokens, ahead.to(tokens)], 1).to(input_device(draft))
    weights, best = row_weights(length - before, ahead.shape[1]), torch.zeros(length)

    def show(layer: int, sight: Sight) -> None:
        heads, spot = sight.keys.shape[1], Spot(scale=sight.scale, softcap=sight.softcap)
        for query, keys in zip(sight.query.chunk(heads, 1), sight.keys.split(1, 1), strict=True):
            rows = looked(View(keys, keys, queries=query, spot=spot), len(weights))
            best.copy_(best.maximum(peak(rows[0, ..., :length], weights).to(best)))

    cache = DynamicCache(config=draft.config)
    draft(whole[:, :before], past_key_values=cache, logits_to_keep=1)
    held = {i: (cache.layers[i].keys, cache.layers[i].values) for i in asked}
    draft(whole[:, before:], past_key_values=going_on(cache.layers, held, show), logits_to_keep=1)
    return best
