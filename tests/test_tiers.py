"""Laws of kvtune/tiers.py: which tokens a query reads, how they are cut, and what they weigh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.chains import Chain
from kvtune.errors import UnsupportedError
from kvtune.fitted import sites
from kvtune.parts import find
from kvtune.policy import Policy
from kvtune.rows import Rows
from kvtune.tiers import Tiers
from kvtune.view import Observed, received

HEADS, SHARE, DIM = 2, 2, 16  # kv heads, query heads of each
TIGHT = {"atol": 1e-9, "rtol": 1e-9}
TWO = Chain((find("affine")(bits=2, group="head"),))
FOUR = Chain((find("affine")(bits=4, group="head"),))
TIERED: dict[str, dict[str, Any]] = {
    "dropped": {"sinks": 2, "recent": 20},
    "dropped-bare": {},
    "two-bits": {"recent": 20, "rest": (TWO, TWO)},
    "both-packed": {"sinks": 3, "recent": 7, "keys": FOUR, "rest": (TWO, FOUR)},
    "lossless": {"recent": 5, "rest": (Chain(), Chain())},
}
every_policy = pytest.mark.parametrize("name", TIERED)


def policy_of(name: str, share: float = 0.25) -> Policy:
    return Policy(select=find("attention")(share=share), **TIERED[name])


def empty(policy: Policy) -> Tiers:
    return Tiers(policy, sites(0, None, {}))


def draw(rows: int, count: int, heads: int = HEADS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, count, DIM, dtype=torch.float64, generator=generator)


def turn(rows: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, whose attention is far from even."""
    query = 3 * draw(rows, count, HEADS * SHARE, seed)
    return query, draw(rows, count, seed=seed + 1), draw(rows, count, seed=seed + 2)


def run(tiers: Any, given: tuple[Tensor, ...], sizes: list[int]) -> Tensor:
    """Reads queries, keys and values in pieces of these sizes; returns all answers."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    assert ends[-1] == given[0].shape[2]
    pieces = [
        tiers.attend(*(x[:, :, end - size : end] for x in given), None, None)
        for size, end in zip(sizes, ends, strict=True)
    ]
    return torch.cat(pieces, 2)


def stored(tiers: Tiers) -> list[Tensor]:
    """All tensors that are held."""
    found = [x for pair in (tiers._sinks, tiers._recent) if pair for x in pair]
    found += [x for x in vars(tiers._beside).values() if x is not None]
    for pages in (pages for tier in tiers.tiers for pages in tier):
        if pages._body is not None:
            held = [pages._body, *(grown for side in pages._sides for grown in side)]
            found += [grown.tensor for grown in held]
    return found


def slowly(given: tuple[Tensor, ...], prompt: int, policy: Policy) -> Tensor:
    """H2O in blocks, one query and one head at a time, with sets of positions: the oracle."""
    query, keys, values = given
    out = torch.zeros_like(query)
    assert policy.split is not None
    block, won = policy.split.block, policy.split.kept
    for b in range(query.shape[0]):
        for h in range(HEADS):
            alive = set(range(policy.sinks))
            got: dict[int, float] = {}
            moved = policy.sinks
            for p in range(query.shape[2]):
                got[p] = 0.0
                seen = [t for t in range(p + 1) if t in alive or t >= moved]
                for head in range(h * SHARE, (h + 1) * SHARE):
                    weights = (keys[b, h, seen] @ query[b, head, p] * DIM**-0.5).softmax(0)
                    out[b, head, p] = weights @ values[b, h, seen]
                    for t, weight in zip(seen, weights.tolist(), strict=True):
                        got[t] += weight
                if p + 1 < prompt:
                    continue
                due = (p + 1 - policy.recent - moved) // block * block
                if due > 0:
                    ranked = sorted(range(moved, moved + due), key=lambda t: -got[t])
                    alive |= set(ranked[: due // block * won])
                    moved += due
    return out


@pytest.mark.parametrize("name", ["dropped", "dropped-bare"])
@pytest.mark.parametrize("prompt", [1, 70, 150])
def test_what_is_read_is_what_an_oracle_of_sets_reads(name: str, prompt: int) -> None:
    """The prompt is ranked as one, by all its queries; then each block within itself."""
    given = turn(1, 240)
    policy = policy_of(name)
    found = run(empty(policy), given, [prompt, *[1] * (240 - prompt)])
    torch.testing.assert_close(found, slowly(given, prompt, policy), **TIGHT)


@every_policy
@pytest.mark.parametrize("prompt", [1, 3, 150])
def test_any_split_of_what_follows_a_prompt_equals_step_by_step(name: str, prompt: int) -> None:
    given = turn(2, prompt + 300)
    expected = run(empty(policy_of(name)), given, [prompt, *[1] * 300])
    for sizes in ([300], [3] * 100, [7, 250, 1, 42], [64] * 4 + [44]):
        tiers = empty(policy_of(name))
        torch.testing.assert_close(run(tiers, given, [prompt, *sizes]), expected, **TIGHT)
        assert tiers.moved > 0


def test_the_split_of_a_prompt_is_that_of_all_its_queries() -> None:
    """So a prompt in two pieces is another prompt: its first piece is ranked without the second."""
    given, policy = turn(1, 192), policy_of("dropped-bare")
    whole, pieces = empty(policy), empty(policy)
    run(whole, given, [192])
    run(pieces, given, [96, 96])
    assert whole.moved == pieces.moved == 192
    kept = [tiers.tiers[0][0].read(torch.float64) for tiers in (whole, pieces)]
    assert kept[0] is not None and kept[1] is not None
    assert kept[0].shape == kept[1].shape
    assert not torch.equal(*kept)
    got = received(given[0], given[1])
    best = got.topk(48, dim=-1).indices.sort(-1).values
    assert torch.equal(kept[0], given[1].gather(2, best[..., None].expand(-1, -1, -1, DIM)))


def test_a_rest_tier_of_16_bits_loses_nothing() -> None:
    given = turn(2, 260)
    found = run(empty(policy_of("lossless")), given, [150, 1, 30, 79])
    dense = Rows(Policy(), sites(0, None, {}))
    torch.testing.assert_close(found, run(dense, given, [150, 1, 30, 79]), **TIGHT)


@pytest.mark.parametrize("kept", [{}, {"keys": FOUR, "values": TWO}], ids=["dense", "packed"])
@pytest.mark.parametrize("rest", [None, (TWO, TWO)], ids=["dropped", "two-bits"])
def test_a_share_of_all_is_bit_identical_to_no_selector(kept: Any, rest: Any) -> None:
    window = {"sinks": 2, "recent": 9, **kept}
    whole = empty(Policy(select=find("attention")(share=1.0), rest=rest, **window))
    plain = Rows(Policy(**window), sites(0, None, {}))
    given, sizes = turn(2, 260), [150, *[1] * 110]
    assert torch.equal(run(whole, given, sizes), run(plain, given, sizes))
    assert all(map(torch.equal, whole.read(torch.float64), plain.read(torch.float64)))


@every_policy
@pytest.mark.parametrize("count", [1, 40, 100, 333])
def test_tiers_hold_no_more_than_they_store(name: str, count: int) -> None:
    policy, (query, keys, values) = policy_of(name), turn(1, count)
    tiers = empty(policy)
    tiers.fill(keys, values, Observed(received(query, keys)))
    assert sum(tiers.nbytes) == sum(x.nbytes for x in stored(tiers))
    assert policy.split
    blocks = policy.due(count) // policy.block
    lengths = [tier[0].tokens for tier in tiers.tiers]
    wanted = [blocks * policy.split.kept, blocks * policy.split.rest]
    assert lengths == wanted[: len(lengths)]


def test_dropped_tokens_take_no_bytes() -> None:
    query, keys, values = turn(1, 128)
    tiers = empty(policy_of("dropped-bare"))
    tiers.fill(keys, values, Observed(received(query, keys)))
    assert sum(tiers.nbytes) == keys[:, :, :32].nbytes * 2


@every_policy
def test_rows_and_heads_do_not_know_each_other(name: str) -> None:
    given = turn(3, 260)
    other = tuple(x.clone() for x in given)
    other[1][1, 1] *= -2
    found, changed = (run(empty(policy_of(name)), x, [150, 30, 80]) for x in (given, other))
    same = (found == changed).all(-1).all(-1)
    assert not same[1, SHARE:].any()
    same[1, SHARE:] = True
    assert same.all()
    alone = run(empty(policy_of(name)), tuple(x[2:] for x in given), [150, 30, 80])
    torch.testing.assert_close(alone, found[2:], **TIGHT)


@every_policy
def test_what_happens_to_a_fork_leaves_its_trunk(name: str) -> None:
    given, more = turn(2, 150), turn(2, 150, seed=7)
    trunk, again = empty(policy_of(name)), empty(policy_of(name))
    run(trunk, given, [150])
    run(again, given, [150])
    twin, before = trunk.fork(), [x.clone() for x in stored(trunk)]
    forked = run(twin, more, [60, 90])
    assert all(map(torch.equal, stored(trunk), before))
    assert torch.equal(run(trunk, more, [60, 90]), forked)
    assert torch.equal(run(again, more, [60, 90]), forked)


@every_policy
def test_selected_rows_are_the_rows(name: str) -> None:
    given, more, index = turn(3, 150), turn(3, 100, seed=7), torch.tensor([2, 0, 2, 2])
    tiers = empty(policy_of(name))
    run(tiers, given, [150])
    twin = tiers.select(index)
    for one, two in zip(stored(tiers), stored(twin), strict=True):
        assert torch.equal(one[index], two)
    found = run(twin, tuple(x[index] for x in more), [100])
    torch.testing.assert_close(found, run(tiers, more, [100])[index], **TIGHT)


@every_policy
def test_a_crop_within_the_window_is_forgotten(name: str) -> None:
    given, wrong = turn(1, 190), turn(1, 4, seed=7)
    plain, cropped = empty(policy_of(name)), empty(policy_of(name))
    run(plain, tuple(x[:, :, :150] for x in given), [150])
    run(cropped, tuple(x[:, :, :150] for x in given), [150])
    run(cropped, wrong, [4])
    assert cropped.moved == plain.moved
    cropped.crop(4)
    assert (cropped.seen, cropped.exact) == (plain.seen, plain.exact)
    more = tuple(x[:, :, 150:160] for x in given)
    expected = run(plain, more, [10])
    assert plain.moved == cropped.moved, "no block left meanwhile"
    assert torch.equal(run(cropped, more, [10]), expected)


@every_policy
def test_a_crop_into_a_tier_is_refused_and_takes_nothing(name: str) -> None:
    tiers = empty(policy_of(name))
    run(tiers, turn(1, 190), [190])
    before = tiers.exact
    with pytest.raises(UnsupportedError, match=f"only the last {before} are still exact"):
        tiers.crop(before + 1)
    assert (tiers.seen, tiers.exact) == (190, before)
