"""Laws of context replay: scores are the peaks of a plain forward, whatever the chunks and blocks,
and the context is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvtune import replay
from kvtune.attention import NAME
from kvtune.errors import UsageError
from kvtune.models import facts
from kvtune.replay import NEVER_SCORED, SINKS, peaks, replayed
from kvtune.watched import Sight, going_on

PROMPT = [7, 8, 9]
Held = dict[int, tuple[Tensor, Tensor]]


def read(model: Any, tokens: Tensor) -> tuple[list[Any], Held]:
    """Returns the layers of a dense context, and what stands in those that are scored."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    full = facts(model.config).compressible()
    return cache.layers, {i: (cache.layers[i].keys, cache.layers[i].values) for i in full}


def replay_of(model: Any, tokens: Tensor, **settings: Any) -> dict[int, Tensor]:
    return replayed(model, tokens, *read(model, tokens), PROMPT, **settings)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_one_chunk_scores_as_one_forward_over_all_does(model: Any, draw: Any) -> None:
    tokens = draw(2, 40)
    sights: dict[int, Sight] = {}
    model.set_attn_implementation(NAME)
    layers, held = read(model, tokens)
    found = replayed(model, tokens, layers, held, PROMPT)
    empty = DynamicCache(config=model.config).layers
    none = {i: (k[:, :, :0], v[:, :, :0]) for i, (k, v) in held.items()}
    asked = tokens.new_tensor([PROMPT]).expand(2, -1)
    whole = torch.cat([tokens, asked, tokens[:, SINKS:]], 1)
    with torch.no_grad():
        model(whole, past_key_values=going_on(empty, none, sights.__setitem__))
    assert found.keys() == held.keys()
    for layer, score in found.items():
        query, keys = sights[layer].query, sights[layer].keys
        heads, own = keys.shape[1], keys[:, :, 40:]
        own_query = query[:, :, 40:].unflatten(1, (heads, -1))
        logits = own_query @ torch.cat([keys[:, :, :40], own], 2)[:, :, None].transpose(-1, -2)
        logits *= sights[layer].scale or keys.shape[-1] ** -0.5
        if cap := sights[layer].softcap:
            logits = torch.tanh(logits / cap) * cap
        rows = own.shape[2]
        ones = torch.ones(rows, 40 + rows, dtype=torch.bool)
        weights = logits.masked_fill(ones.triu(41), float("-inf")).softmax(-1)
        torch.testing.assert_close(score[..., SINKS:], weights[..., SINKS:40].amax((2, 3)))


def test_what_is_never_scored_is_above_all_that_is(llama: Any, draw: Any) -> None:
    for score in replay_of(llama, draw(1, 50), prefix=9).values():
        assert (score[..., :9] == NEVER_SCORED).all()
        assert (score[..., 9:] <= 1).all()
        assert (score[..., 9:] > 0).all()


def test_a_token_is_scored_against_its_own_chunk(llama: Any, draw: Any) -> None:
    """So that chunks of other lengths give other scores, and each token one."""
    tokens = draw(1, 44)
    one, two = replay_of(llama, tokens), replay_of(llama, tokens, chunk=15)
    assert all((score[..., SINKS:] <= 1).all() for score in two.values())
    assert not any(torch.equal(one[layer], two[layer]) for layer in one)


def test_rows_of_a_batch_do_not_know_each_other(llama: Any, draw: Any) -> None:
    tokens = draw(2, 40)
    both, alone = replay_of(llama, tokens, chunk=16), replay_of(llama, tokens[1:], chunk=16)
    for layer, score in alone.items():
        torch.testing.assert_close(both[layer][1:], score)


def test_blocks_of_queries_change_nothing(
    llama: Any, draw: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = draw(1, 40)
    whole = replay_of(llama, tokens)
    monkeypatch.setattr(replay, "LOGITS", 2000)
    for layer, score in replay_of(llama, tokens).items():
        torch.testing.assert_close(score, whole[layer])


def test_a_replay_leaves_the_context_as_it_was(llama: Any, draw: Any) -> None:
    tokens = draw(1, 40)
    layers, held = read(llama, tokens)
    before = {i: (k.clone(), v.clone()) for i, (k, v) in held.items()}
    replayed(llama, tokens, layers, held, PROMPT, chunk=16)
    assert [layer.get_seq_length() for layer in layers] == [40] * 4
    for layer, pair in before.items():
        assert all(torch.equal(*both) for both in zip(pair, held[layer], strict=True))


def test_peaks_are_those_of_a_softmax_over_first_own_and_read() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 5, 8, generator=generator)
    keys = torch.randn(1, 2, 30, 8, generator=generator)
    found = peaks(Sight(query, keys, 0.5, None), slice(10, 20), 2)
    seen = torch.cat([keys[:, :, :2], keys[:, :, 10:20], keys[:, :, -5:]], 2)
    logits = query.unflatten(1, (2, 2)) @ seen[:, :, None].transpose(-1, -2) * 0.5
    logits = logits.masked_fill(torch.ones(5, 17, dtype=torch.bool).triu(13), float("-inf"))
    torch.testing.assert_close(found, logits.softmax(-1)[..., 2:12].amax((2, 3)))


def test_a_replay_takes_smaller_chunks_where_positions_end(model_of: Any, draw: Any) -> None:
    short = model_of("llama", max_position_embeddings=100)
    tokens = draw(1, 60)
    cut = 100 - 60 - len(PROMPT) - replay.LEAD
    narrow, same = replay_of(short, tokens), replay_of(short, tokens, chunk=cut)
    assert all(torch.equal(narrow[layer], same[layer]) for layer in same)


def test_a_context_that_leaves_no_room_is_refused(model_of: Any, draw: Any) -> None:
    short = model_of("llama", max_position_embeddings=64)
    with pytest.raises(
        UsageError, match=r"replay of 60 tokens .* exceeds the model's 64 positions"
    ):
        replay_of(short, draw(1, 60))
