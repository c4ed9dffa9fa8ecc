"""Laws of kvtune/fused_tiers.py: tiers that kernels read are what plain tiers are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kvtune_kernels import implementation
from torch import Tensor

from kvtune.cache import sites
from kvtune.chains import Chain
from kvtune.errors import UnsupportedError
from kvtune.fused_tiers import FusedTiers, serves_tiers
from kvtune.heads import make_layer
from kvtune.parts import find
from kvtune.policy import Policy
from kvtune.tiers import Tiers

# the interpreter is numpy, which speaks of what `tl.where` then leaves out
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

HEADS, SHARE, DIM = 2, 2, 64
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def affine(bits: int, **more: Any) -> Any:
    return find("affine")(bits=bits, **({"group": "head"} | more))


TWO, FOUR = Chain((affine(2),)), Chain((affine(4, group=64, axis="channel"),))
TURNED = Chain((find("hadamard")(), affine(4)))
SNAP, H2O, NORM = find("snapkv"), find("attention"), find("knorm")
BY_SHARE, BUDGET = {"share": 0.25}, {"budget": 96, "every": 16}
CASES: dict[str, Policy] = {
    "share": Policy(select=SNAP(**BY_SHARE, window=8), sinks=3, recent=10),
    "bare": Policy(select=NORM(share=0.15)),
    "budget": Policy(select=SNAP(**BUDGET, window=8), sinks=2, recent=20),
    "summed": Policy(select=H2O(**BY_SHARE), recent=7),
    "summed-budget": Policy(select=H2O(**BUDGET), sinks=1, recent=20),
    "alike": Policy(select=NORM(budget=60, every=16, alike=True), sinks=2, recent=20),
    "packed": Policy(select=NORM(share=0.5), sinks=4, recent=10, keys=FOUR, values=TWO),
    "packed-budget": Policy(
        select=NORM(budget=200, every=64), sinks=4, recent=10, keys=FOUR, values=TWO
    ),
    "summed-packed": Policy(select=H2O(budget=200), recent=5, keys=TWO, values=TWO),
    "turned": Policy(select=NORM(share=0.5), sinks=4, recent=10, keys=TURNED, values=TURNED),
    "rest": Policy(select=H2O(**BY_SHARE), sinks=2, recent=20, rest=(TWO, TWO)),
    "rest-turned": Policy(select=H2O(share=0.5), recent=9, rest=(TURNED, TWO)),
    "both-packed": Policy(
        select=NORM(share=0.5), sinks=3, recent=7, keys=FOUR, values=FOUR, rest=(TWO, TWO)
    ),
    "merged": Policy(select=NORM(**BUDGET), recent=20, merge=find("d2o")()),
}
every_policy = pytest.mark.parametrize("name", CASES)


def given(batch: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, Hq, n, D], keys and values [B, H, n, D]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(batch, heads, count, DIM, generator=generator)

    return draw(HEADS * SHARE), draw(HEADS), draw(HEADS)


def plain(name: str) -> Tiers:
    return Tiers(CASES[name], sites(0, None, {}))


def fused(name: str) -> FusedTiers:
    return FusedTiers(CASES[name], sites(0, None, {}))


def play(
    tiers: Tiers, fresh: tuple[Tensor, ...], sizes: Sequence[int], softcap: float | None = None
) -> Tensor:
    """Runs chunks through tiers; returns all answers."""
    out, ends = [], list(itertools.accumulate(sizes))
    for end, size in zip(ends, sizes, strict=True):
        q, k, v = (x[:, :, end - size : end] for x in fresh)
        out.append(tiers.attend(q, k, v, None, softcap))
        assert out[-1].shape == q.shape
    return torch.cat(out, 2)


def same(one: Tiers, other: Tiers) -> None:
    """Both hold the same tokens."""
    assert (one.seen, one.moved, one.exact) == (other.seen, other.moved, other.exact)
    for x, y in zip(one.read(torch.float32), other.read(torch.float32), strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


SIZES = ([150, *[1] * 70], [2, *[1] * 100, 70], [70, 90, 1, 1, 120, 3])
FEW = ("budget", "summed-packed", "rest-turned", "both-packed")
few_policies = pytest.mark.parametrize("name", FEW)


@every_policy
@pytest.mark.parametrize("sizes", SIZES, ids=["steps", "from nothing", "chunks"])
def test_fused_tiers_answer_as_plain_tiers_do(name: str, sizes: list[int]) -> None:
    """Prompts, decoding over several evictions, and chunks; and they keep the same tokens."""
    ours, theirs, fresh = fused(name), plain(name), given(2, sum(sizes))
    torch.testing.assert_close(play(ours, fresh, sizes), play(theirs, fresh, sizes), **CLOSE)
    assert theirs.moved > 0
    same(ours, theirs)


@every_policy
def test_capped_logits_are_capped(name: str) -> None:
    ours, theirs, fresh = fused(name), plain(name), given(1, 180, 3)
    sizes = [150, *[1] * 20, 10]
    found = play(ours, fresh, sizes, 1.5)
    torch.testing.assert_close(found, play(theirs, fresh, sizes, 1.5), **CLOSE)
    same(ours, theirs)


@few_policies
def test_a_fork_and_its_trunk_leave_each_other_as_they_were(name: str) -> None:
    start, sizes = given(2, 160), [140, 18, 1, 1]
    trunk, expected = fused(name), plain(name)
    play(trunk, start, sizes)
    play(expected, start, sizes)
    twin, alike = trunk.fork(), expected.fork()
    for seed in (7, 8):
        one, two = given(2, 90, seed), given(2, 90, 10 + seed)
        for tiers, other, fresh in ((twin, alike, one), (trunk, expected, two)):
            found = play(tiers, fresh, [30] * 3)
            torch.testing.assert_close(found, play(other, fresh, [30] * 3), **CLOSE)
    same(twin, alike)
    same(trunk, expected)


@few_policies
def test_selected_rows_go_on_as_themselves(name: str) -> None:
    tiers, order = fused(name), [2, 0, 2]
    play(tiers, given(3, 160), [140, 18, 1, 1])
    chosen, fresh = tiers.select(torch.tensor(order)), given(3, 70, 5)
    own = tuple(x[order] for x in fresh)
    sizes = [1, 1, 68]
    found, out = play(chosen, own, sizes), play(tiers, fresh, sizes)
    torch.testing.assert_close(found, out[order], **CLOSE)


@few_policies
def test_a_crop_takes_back_what_is_exact_and_no_more(name: str) -> None:
    ours, theirs, start = fused(name), plain(name), given(1, 170)
    for tiers in (ours, theirs):
        play(tiers, start, [165, *[1] * 5])
        tiers.crop(min(4, tiers.exact))
    same(ours, theirs)
    fresh = given(1, 80, 9)
    sizes = [1, 1, 78]
    torch.testing.assert_close(play(ours, fresh, sizes), play(theirs, fresh, [80]), **CLOSE)
    with pytest.raises(UnsupportedError, match="only the last"):
        ours.crop(ours.exact + 1)


def storages(tiers: FusedTiers) -> int:
    """Bytes of everything that is held, each storage once."""
    found = [x for pair in (tiers._sinks, tiers._recent) if pair for x in pair]
    found += [x for x in vars(tiers._beside).values() if x is not None]
    found += [x for x in (tiers._folded, tiers._none) if isinstance(x, Tensor)]
    for pages in itertools.chain(*tiers.tiers, tiers._bare):
        found += [x for x in (pages._codes, pages._meta) if x is not None]  # type: ignore[attr-defined]
        if pages._ragged is not None:  # type: ignore[attr-defined]
            plans = pages._ragged.plans.values()  # type: ignore[attr-defined]
            found += [x for plan in plans for x in (plan.items, plan.first)]
    return sum(
        {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values()
    )


@every_policy
def test_bytes_are_those_that_are_held(name: str) -> None:
    """Which are those of plain tiers, room for a block, a page of each tier, and 1/32."""
    ours, theirs, fresh = fused(name), plain(name), given(1, 240)
    for tiers in (ours, theirs):
        play(tiers, fresh, [200, 38, 1, 1])
    assert sum(ours.nbytes) == storages(ours)
    policy, token = ours.policy, 2 * HEADS * DIM * 4
    spare = (policy.sinks + policy.recent + policy.block + 4 * 64) * token
    assert sum(theirs.nbytes) <= sum(ours.nbytes) <= sum(theirs.nbytes) * 33 / 32 + spare


def test_a_decoded_token_is_written_where_it_lies() -> None:
    """No tensor of the window or of what is kept is made anew before a block leaves."""
    tiers = fused("packed")
    play(tiers, given(1, 200), [200])
    assert tiers._until_due > 20
    assert tiers._buffer is not None
    before = [x.data_ptr() for x in tiers._buffer], [p._ragged for p in tiers.tiers[0]]  # type: ignore[attr-defined]
    play(tiers, given(1, 1, 3), [1])
    ragged = [p._ragged for p in tiers.tiers[0]]  # type: ignore[attr-defined]
    play(tiers, given(1, 19, 4), [1] * 19)
    assert [x.data_ptr() for x in tiers._buffer] == before[0]
    assert all(p._ragged is x for p, x in zip(tiers.tiers[0], ragged, strict=True))  # type: ignore[attr-defined]


SMALL = {"sinks": 2, "recent": 12}
READ = {
    "share": Policy(select=SNAP(**BY_SHARE, window=8), **SMALL),
    "budget": Policy(select=H2O(budget=40, every=16), **SMALL),
    "packed": Policy(select=NORM(budget=78, every=64), keys=FOUR, values=TWO, **SMALL),
    "rest": Policy(select=H2O(**BY_SHARE), rest=(TWO, TWO), **SMALL),
}


@pytest.mark.parametrize("name", READ)
def test_a_layer_is_read_by_kernels_as_in_plain_torch(name: str) -> None:
    """In bfloat16, with a padded row; on a CPU under Triton's interpreter."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, keys, values = (x.to(device, torch.bfloat16) for x in given(2, 113))
    found, kinds = {}, {"reference": Tiers, "triton": FusedTiers}
    for choice, kind in kinds.items():
        with implementation(choice):
            layer, out, start = make_layer(READ[name], sites(0, None, {})), [], 0
            for end in (110, 111, 113):
                tokens = torch.arange(end, device=device)
                mask = (tokens <= tokens[start:, None]).repeat(2, 1, 1, 1)
                mask[1, ..., :3] = False
                layer.update(keys[:, :, start:end], values[:, :, start:end])
                out.append(layer.attend(query[:, :, start:end], mask, None, None))
                start = end
            assert {type(group.rows) for group in layer.groups} == {kind}
            found[choice] = torch.cat(out[1:], 2).float()
    error = (found["triton"] - found["reference"]).norm() / found["reference"].norm()
    assert error <= 0.03


def test_what_kernels_do_not_read_is_plain() -> None:
    keys = given(1, 1)[1].bfloat16()
    mixed = Policy(select=NORM(share=0.5), keys=FOUR)
    latent = Policy(select=NORM(share=0.5), keys=Chain((find("svd")(rank=0.25),)))
    with implementation("triton"):
        assert serves_tiers(CASES["rest"], keys)
        assert not serves_tiers(mixed, keys), "one side is packed, the other is not"
        assert not serves_tiers(latent, keys)
        assert not serves_tiers(CASES["rest"], keys.float()), "no kernel reads 32 bits"
    assert not serves_tiers(CASES["rest"], keys) or keys.is_cuda
