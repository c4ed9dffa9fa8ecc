"""Our scorers keep the tokens that kvpress 0.5.5 keeps: see tests/methods/kvpress_fixture.py.

kvpress lifts what it protects, sinks and window, above all scores. Here these are the policy's, and
never compete: so the tokens are compared that compete in both, the same share of them. Of equal
scores the later token wins; kvpress leaves that to chance, so its scores are cut as ours are.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from kvpress_inputs import (
    BATCH,
    DIM,
    HEADS,
    QUERY_HEADS,
    SHARES,
    SINKS,
    THETA,
    TOKENS,
    heads,
    inputs,
)
from safetensors.torch import load_file
from scorer_views import Turning
from torch import Tensor
from torch.testing import assert_close

from kvtune.methods.attention import Attention
from kvtune.methods.critical import Critical
from kvtune.methods.expected import Expected
from kvtune.methods.keydiff import Keydiff
from kvtune.methods.knorm import Knorm
from kvtune.methods.lagkv import Lagkv
from kvtune.methods.snapkv import Snapkv
from kvtune.methods.streaming import Streaming
from kvtune.methods.tova import Tova
from kvtune.retention import Selector
from kvtune.rope import Rope
from kvtune.splits import parted
from kvtune.view import Spot, View, received

THEIRS = load_file(Path(__file__).with_name("kvpress_scores.safetensors"))


class Pair(NamedTuple):
    """A scorer, and what kvpress protects beside it."""

    ours: Selector
    theirs: str
    sinks: int = 0
    window: int = 0

    def __str__(self) -> str:
        return self.theirs


SAME = [  # in number
    Pair(Knorm(), "knorm"),
    Pair(Keydiff(), "keydiff"),  # its mean is over all keys there: none is a sink
    Pair(Snapkv(window=32, kernel=5), "snapkv.32.5", window=32),
    Pair(Snapkv(window=8, kernel=7), "snapkv.8.7", window=8),
    Pair(Expected(), "expected.0", SINKS),
    Pair(Expected(epsilon=0.02), "expected.0.02", SINKS),
    Pair(Tova(), "tova", window=1),
]
every_same = pytest.mark.parametrize("pair", SAME, ids=str)
every_share = pytest.mark.parametrize("share", SHARES)


def view_of(sinks: int, window: int) -> View:
    """The tokens of the fixture, of which so many do not compete."""
    given = inputs()
    query, keys, values = (heads(given.hidden, w) for w in (given.query, given.key, given.value))
    rope = Rope(Turning(DIM, THETA))
    query, keys = (rope.turn(x, torch.arange(TOKENS)) for x in (query, keys))
    own = slice(sinks, TOKENS - window)
    return View(
        keys[:, :, own],
        values[:, :, own],
        received(query, keys)[:, :, own],
        query,
        keys[:, :, :sinks] if sinks else None,
        keys[:, :, TOKENS - window :] if window else None,
        torch.arange(TOKENS)[own],
        TOKENS,
        spot=Spot(rope=rope, output=given.output.T.unflatten(0, (QUERY_HEADS, DIM))),
    )


def competing(pair: Pair) -> tuple[View, Tensor]:
    """Our view, and the scores of kvpress, of the tokens that compete in both."""
    theirs = THEIRS[pair.theirs][..., pair.sinks : TOKENS - pair.window]
    return view_of(pair.sinks, pair.window), theirs


@every_same
def test_scores_are_the_same_numbers(pair: Pair) -> None:
    view, theirs = competing(pair)
    assert_close(pair.ours.score(view), theirs, rtol=1e-4, atol=1e-6)


@every_share
@pytest.mark.parametrize("pair", [*SAME, Pair(Lagkv(lag=64), "lagkv", SINKS)], ids=str)
def test_the_same_tokens_stay(pair: Pair, share: float) -> None:
    view, theirs = competing(pair)
    count = int(share * theirs.shape[-1])
    assert torch.equal(pair.ours.choose(view, count).places, parted(theirs, count)[0])


def test_lag_ranks_alike_within_each_partition() -> None:
    """The last partition and what follows it are all 1 in kvpress: ours go by recency there."""
    view, theirs = competing(Pair(Lagkv(lag=64), "lagkv", SINKS))
    ours = Lagkv(lag=64).score(view)
    assert_close(ours[..., :192], theirs[..., :192])
    assert (theirs[..., 192:] == 1).all() and (ours[..., 192:] >= 1).all()


@every_share
def test_the_last_tokens_stay_that_are_no_sinks(share: float) -> None:
    """kvpress marks what stays of all tokens with 1, sinks included."""
    kept = THEIRS[f"streaming.{share}"][..., SINKS:] == 1
    count = int(kept[0, 0].sum())
    assert count == int(TOKENS * (1 - (1 - share))) - SINKS  # 0.1 of 280 is 27 to it
    places = Streaming().choose(view_of(SINKS, 0), count).places
    assert kept.gather(-1, places).all()
    assert places.shape == (BATCH, HEADS, count)


@every_share
def test_two_stages_keep_the_same_tokens(share: float) -> None:
    """kvpress was given the tokens before the window alone: else the window, which it counts in,
    takes most of the first stage."""
    theirs = THEIRS[f"critical.{share}"]
    count = int(share * theirs.shape[-1])
    places = Critical(window=32, kernel=5).choose(view_of(0, 32), count).places
    assert torch.equal(places, parted(theirs, count)[0])
    assert int((theirs == torch.finfo().max).sum(-1).max()) == count // 2


def test_accumulated_attention_is_theirs_before_they_take_means() -> None:
    """kvpress divides by the queries that saw a token and by the heads of a group; H2O, and so
    `attention`, sums: the order of tokens is another one on purpose."""
    view = view_of(0, 0)
    seen_by = torch.arange(TOKENS, 0, -1) * (QUERY_HEADS // HEADS)
    ours = Attention().score(view)
    assert_close(ours / seen_by, THEIRS["attention"], rtol=1e-4, atol=1e-6)
    assert not torch.equal(parted(ours, 28)[0], parted(THEIRS["attention"], 28)[0])


@every_share
@every_same
def test_no_cut_of_the_fixture_is_a_matter_of_rounding(pair: Pair, share: float) -> None:
    """Else the tokens that stay could differ from machine to machine."""
    _, theirs = competing(pair)
    count = int(share * theirs.shape[-1])
    best = theirs.sort(-1, descending=True).values
    gap = (best[..., count - 1] - best[..., count]) / best[..., count].abs()
    assert (gap > 1e-5).all(), "draw another seed"
