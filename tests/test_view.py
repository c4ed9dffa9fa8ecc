"""Laws of kvtune/view.py: the attention that tokens get is what a whole softmax says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvtune.view import received


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def whole(query: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The same from one [n, T] of each query head."""
    share, count, length = query.shape[1] // keys.shape[1], query.shape[2], keys.shape[2]
    logits = query @ keys.repeat_interleave(share, 1).transpose(-1, -2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    seen = torch.arange(length) <= torch.arange(length - count, length)[:, None]
    attention = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return attention.sum(2).unflatten(1, (-1, share)).sum(2)


@pytest.mark.parametrize("held", [1, 600, 1 << 24], ids=lambda held: f"held{held}")
@pytest.mark.parametrize(("scale", "softcap"), [(None, None), (0.9, None), (0.5, 2.0)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (7, 1)])
@pytest.mark.parametrize("count", [1, 5, 37])
def test_blocks_of_queries_sum_to_what_one_softmax_gives(
    count: int,
    heads: int,
    kv_heads: int,
    scale: float | None,
    softcap: float | None,
    held: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvtune.view.LOGITS", held)
    query, keys = draw(2, heads, count, 8), draw(2, kv_heads, 37, 8, seed=1)
    found = received(query, keys, scale, softcap)
    torch.testing.assert_close(found, whole(query, keys, scale or 8**-0.5, softcap))


def test_every_query_gives_away_exactly_one() -> None:
    found = received(draw(3, 4, 20, 8), draw(3, 2, 50, 8, seed=1))
    torch.testing.assert_close(found.sum(-1), torch.full((3, 2), 40.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_16_bits_are_in_float32(dtype: torch.dtype) -> None:
    query, keys = draw(1, 2, 300, 8).to(dtype), draw(1, 2, 300, 8, seed=1).to(dtype)
    found = received(query, keys)
    assert found.dtype == torch.float32
    expected = whole(query.double(), keys.double(), 8**-0.5, None).float()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_no_token_gets_attention_from_before_it_was_there() -> None:
    query, keys = draw(1, 1, 9, 8), draw(1, 1, 9, 8, seed=1)
    before = received(query[:, :, :5], keys[:, :, :5])
    after = received(query[:, :, 5:], keys)
    whole_run = received(query, keys)
    torch.testing.assert_close(whole_run[:, :, :5], before + after[:, :, :5])
    torch.testing.assert_close(whole_run[:, :, 5:], after[:, :, 5:])
