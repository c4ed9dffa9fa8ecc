"""Laws of kvtune/in_cache.py: where tokens stand in a cache, and that a text may have no end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tiers import TIGHT, run, stored, turn
from torch import Tensor, nn

from kvtune import recipe as recipes
from kvtune.cache import CompressedCache, load
from kvtune.chains import Chain
from kvtune.errors import UnsupportedError, UsageError
from kvtune.fitted import sites
from kvtune.in_cache import InCache
from kvtune.ladders import Ladder
from kvtune.layer import CompressedLayer
from kvtune.parts import find
from kvtune.policy import Policy
from kvtune.rope import Rope
from kvtune.rows import Rows
from kvtune.view import Spot

DIM, LAYERS, LAYER, BUDGET, SINKS, RECENT, EVERY = 16, 6, 3, 64, 3, 5, 16


class Turning(nn.Module):
    """Rotary tables of 16 channels, in float64, scaled as YaRN scales them."""

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        speed = 1e4 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
        angles = positions[..., None] * speed
        both = torch.cat([angles, angles], -1)
        return 1.1 * both.cos(), 1.1 * both.sin()


ROPE = Rope(Turning())
FOUR = Chain((find("affine")(bits=4, group="head"),))
POLICIES = {
    "ladder": Policy(
        select=find("ladder")(budget=BUDGET, every=EVERY, overlap=1), sinks=SINKS, recent=RECENT
    ),
    "bare": Policy(select=find("ladder")(budget=BUDGET, every=EVERY, span=2)),
    "packed": Policy(
        select=find("ladder")(budget=BUDGET, every=EVERY), recent=9, keys=FOUR, values=FOUR
    ),
    "by-share": Policy(select=find("ladder")(share=0.25), sinks=SINKS, recent=RECENT),
}
every_policy = pytest.mark.parametrize("name", POLICIES)


def empty(policy: Policy) -> InCache:
    return InCache(policy, sites(LAYER, ROPE, {}), Spot(LAYER, LAYERS, rope=ROPE))


def turned(given: tuple[Tensor, ...], start: int = 0) -> tuple[Tensor, ...]:
    """Queries, keys and values as a model gives them, from a true position on."""
    query, keys, values = given
    positions = torch.arange(start, start + keys.shape[2])
    return ROPE.turn(query, positions), ROPE.turn(keys, positions), values


def slowly(given: tuple[Tensor, ...], prompt: int) -> tuple[Tensor, int]:
    """LaCache token by token, with a list of the tokens that are held: the oracle of "ladder"."""
    query, keys, values = given
    stairs, out = Ladder(LAYERS, LAYERS // 2, 1), torch.zeros_like(query)
    held: list[int] = []
    cursor = SINKS
    for p in range(query.shape[2]):
        held.append(p)
        every = torch.arange(len(held))
        k = ROPE.turn(keys[:, :, held], every).repeat_interleave(2, 1)
        q = ROPE.turn(query[:, :, p : p + 1], every[-1:])
        weights = (q @ k.transpose(2, 3) * DIM**-0.5).softmax(-1)
        out[:, :, p] = (weights @ values[:, :, held].repeat_interleave(2, 1))[:, :, 0]
        fits = BUDGET if p + 1 == prompt else BUDGET + EVERY - 1
        if p + 1 >= prompt and len(held) > fits:
            found = stairs.compact(LAYER, len(held), BUDGET, cursor, SINKS)
            held, cursor = [held[place] for place in found.places.tolist()], found.cursor
    return out, len(held)


@pytest.mark.parametrize("prompt", [1, 40, 150])
def test_what_is_read_is_what_lacache_reads(prompt: int) -> None:
    """Tokens stand one after the other, and the query behind them, whatever was between them."""
    given, tiers = turn(1, 400), empty(POLICIES["ladder"])
    found = run(tiers, turned(given), [prompt, *[1] * (400 - prompt)])
    expected, held = slowly(given, prompt)
    assert abs(tiers.held - held) < EVERY  # when it is due differs where a stair took too much
    same = 150 if prompt == 150 else 80
    torch.testing.assert_close(found[:, :, :same], expected[:, :, :same], **TIGHT)
