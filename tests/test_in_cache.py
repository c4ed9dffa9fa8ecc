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
    "recency": Policy(
        select=find("streaming")(budget=BUDGET, every=EVERY, positions="cache"), sinks=4, recent=9
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


def slowly(given: tuple[Tensor, ...], prompt: int) -> Tensor:
    """LaCache token by token, with a list of the tokens that are held: the oracle of "ladder"."""
    query, keys, values = given
    stairs, out = Ladder(LAYERS, LAYERS // 2, 1), torch.zeros_like(query)
    held: list[int] = []
    cursor, last = SINKS, max(prompt, SINKS + RECENT)
    for p in range(query.shape[2]):
        held.append(p)
        every = torch.arange(len(held))
        k = ROPE.turn(keys[:, :, held], every).repeat_interleave(2, 1)
        q = ROPE.turn(query[:, :, p : p + 1], every[-1:])
        weights = (q @ k.transpose(2, 3) * DIM**-0.5).softmax(-1)
        out[:, :, p] = (weights @ values[:, :, held].repeat_interleave(2, 1))[:, :, 0]
        if p + 1 == prompt or (p + 1 > last and (p + 1 - last) % EVERY == 0):
            found = stairs.compact(LAYER, len(held), BUDGET, cursor, SINKS)
            held, cursor = [held[place] for place in found.places.tolist()], found.cursor
    return out


@pytest.mark.parametrize("prompt", [1, 40, 150])
def test_what_is_read_is_what_lacache_reads(prompt: int) -> None:
    """Tokens stand one after the other, and the query behind them, whatever was between them."""
    given, tiers = turn(1, 260), empty(POLICIES["ladder"])
    found = run(tiers, turned(given), [prompt, *[1] * (260 - prompt)])
    torch.testing.assert_close(found, slowly(given, prompt), **TIGHT)
    assert BUDGET - 2 <= tiers.held < BUDGET + EVERY


@every_policy
@pytest.mark.parametrize("prompt", [1, 90])
def test_any_split_of_what_follows_a_prompt_equals_step_by_step(name: str, prompt: int) -> None:
    given = turned(turn(2, prompt + 300))
    expected = run(empty(POLICIES[name]), given, [prompt, *[1] * 300])
    for sizes in ([300], [3] * 100, [7, 250, 1, 42]):
        tiers = empty(POLICIES[name])
        torch.testing.assert_close(run(tiers, given, [prompt, *sizes]), expected, **TIGHT)
        assert tiers.held < 300


def test_while_nothing_is_dropped_positions_are_the_true_ones() -> None:
    given = turned(turn(2, BUDGET))
    plain = Rows(Policy(), sites(LAYER, ROPE, {}))
    found = run(empty(POLICIES["ladder"]), given, [40, 1, 20, 3])
    torch.testing.assert_close(found, run(plain, given, [40, 1, 20, 3]), **TIGHT)


def test_a_place_in_the_text_far_away_makes_no_difference() -> None:
    """What is held after the same tokens is read alike, however far the text has come."""
    policy, more = POLICIES["bare"], turn(1, 4, seed=9)
    near = empty(policy)
    run(near, turned(turn(1, 90)), [90])
    far = near.fork()
    assert isinstance(far, InCache)
    far.seen += 100_000
    found = run(near, turned(more, 90), [4]), run(far, turned(more, 100_090), [4])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


def test_a_key_is_turned_back_once_and_stays_as_it_is() -> None:
    """However often it is read: sinks have the bits that they came with."""
    tiers = empty(POLICIES["ladder"])
    run(tiers, turned(turn(1, 20)), [20])
    assert tiers._sinks is not None
    before = tiers._sinks[0].clone()
    torch.testing.assert_close(before, turn(1, 20)[1][:, :, :SINKS], **TIGHT)
    run(tiers, turned(turn(1, 500, seed=5), 20), [1] * 500)
    assert torch.equal(tiers._sinks[0], before)


def test_a_range_of_positions_turns_as_its_positions_do_and_few_are_remembered() -> None:
    rope, x = Rope(Turning()), turn(1, 9)[1]
    for start in (0, 5, 90_000, 7, 5, 0):
        own = range(start, start + 9)
        for way in (rope.turn, rope.unturn):
            for _ in range(2):
                assert torch.equal(way(x, own), way(x, torch.tensor(own)))
    assert 0 < len(rope._ranges) <= 8
    rope.forget()
    assert not rope._ranges


@every_policy
def test_tiers_hold_no_more_than_they_store(name: str) -> None:
    tiers, query = empty(POLICIES[name]), turned(turn(1, 333))
    run(tiers, query, [40, 293])
    if POLICIES[name].renews:  # else pages grow, with slack
        assert sum(tiers.nbytes) == sum(x.nbytes for x in stored(tiers))
    keys, values = tiers.read(torch.float64)
    assert keys.shape[2] == values.shape[2] == tiers.held


def test_a_cache_of_a_set_size_takes_the_same_bytes_after_any_text() -> None:
    tiers, sizes = empty(POLICIES["ladder"]), set()
    run(tiers, turned(turn(1, 50)), [50])
    for step in range(30):
        run(tiers, turned(turn(1, 160, seed=step), 50 + 160 * step), [160])
        sizes.add((tiers.held, *tiers.nbytes))
    assert max(sizes)[0] < BUDGET + EVERY
    assert len(sizes) <= 4, "what differs is by how much a stair took more than it had to"


@every_policy
def test_rows_do_not_know_each_other_and_heads_stay_apart(name: str) -> None:
    given = turned(turn(3, 260))
    alone = run(empty(POLICIES[name]), tuple(x[2:] for x in given), [150, 30, 80])
    found = run(empty(POLICIES[name]), given, [150, 30, 80])
    torch.testing.assert_close(alone, found[2:], **TIGHT)


@every_policy
def test_forks_and_chosen_rows_go_on_as_their_trunk(name: str) -> None:
    given, more = turned(turn(2, 150)), turned(turn(2, 120, seed=7), 150)
    trunk = empty(POLICIES[name])
    run(trunk, given, [150])
    before, twin = [x.clone() for x in stored(trunk)], trunk.fork()
    forked, index = run(twin, more, [40, 80]), torch.tensor([1, 1, 0])
    chosen = run(trunk.select(index), tuple(x[index] for x in more), [120])
    assert all(map(torch.equal, stored(trunk), before))
    assert torch.equal(run(trunk, more, [40, 80]), forked)
    torch.testing.assert_close(chosen, forked[index], **TIGHT)


@every_policy
def test_a_crop_within_the_window_is_forgotten(name: str) -> None:
    plain, given = empty(POLICIES[name]), turned(turn(1, 150))
    run(plain, given, [150])
    cropped, most = plain.fork(), plain.exact
    run(cropped, turned(turn(1, 4, seed=7), 150), [4])
    cropped.crop(4)
    more = turned(turn(1, 8, seed=8), 150)
    assert torch.equal(run(cropped, more, [8]), run(plain, more, [8]))
    with pytest.raises(UnsupportedError, match="are still exact"):
        plain.crop(most + 80)


RECIPE = """kvtune = 1
[[layers]]
span = "all"
sinks = 2
recent = 4
select = { use = "ladder", budget = 40, every = 16 }
"""


def cache_of(model: Any, text: str = RECIPE) -> CompressedCache:
    return load(recipes.loads(text), model)


def said(model: Any, ids: Tensor, mask: Tensor, count: int) -> tuple[Tensor, CompressedCache]:
    """What `generate` says, so many tokens, and the cache that it leaves."""
    cache = cache_of(model)
    made = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return made[:, ids.shape[1] :], cache


def test_a_padded_row_says_what_it_says_alone(llama: Any) -> None:
    ids = torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :9], mask[1, :9] = 0, 0
    both, _ = said(llama, ids, mask, 45)
    for row, pad in ((0, 0), (1, 9)):
        alone, _ = said(llama, ids[row : row + 1, pad:], mask[row : row + 1, pad:], 45)
        assert torch.equal(both[row : row + 1], alone)


def test_generate_goes_on_beyond_the_positions_of_the_model(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.config, "max_position_embeddings", 64)
    ids = torch.randint(3, 60, (1, 8), generator=torch.Generator().manual_seed(0))
    _, short = said(llama, ids, torch.ones_like(ids), 60)
    made, long = said(llama, ids, torch.ones_like(ids), 120)
    assert made.shape == (1, 120)
    for layer in long.layers:
        assert isinstance(layer, CompressedLayer)
        assert layer.get_seq_length() == 8 + 120 - 1
        (group,) = layer.groups
        assert isinstance(group.rows, InCache)
        assert group.rows.held < 40 + 16
    assert long.nbytes <= short.nbytes * 56 / 38
    assert not any(rope._ranges for rope in long._made_of[2].values()), "the last layer forgets"
    assert bool(torch.isfinite(llama(made[:, -1:], past_key_values=long).logits).all())


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        ('kept.keys = [{ use = "derope" }]', "ladder has turned back already"),
        ('merge = { use = "look_m", keys = "merged" }', r"look_m\(.*\) turns keys by their pos"),
        (
            'kept.values = [{ use = "affine", bits = 4, group = 32, axis = "channel" }]',
            "encodes 64 tokens together, and ladder chooses one by one",
        ),
    ],
)
def test_what_reads_positions_or_blocks_is_refused(llama: Any, kept: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        cache_of(llama, RECIPE.replace("40", "99") + kept)
