"""Laws of kvtune/fused.py: rows in kernels' hands are what plain rows are, however long each is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kvtune_kernels import Workspace, implementation
from torch import Tensor

from kvtune.cache import load, sites
from kvtune.errors import UnsupportedError
from kvtune.fused import FusedRows
from kvtune.models import facts
from kvtune.recipe import Policy
from kvtune.rows import Rows

HEADS, SHARE, DIM = 2, 3, 64
NAMES = ("k8v8", "k4v2-windowed", "k2v4-bare", "v2-per-channel")  # one affine codec on both sides


@pytest.fixture(params=NAMES)
def policy(request: pytest.FixtureRequest, llama: Any, recipe_of: Any) -> Policy:
    """A policy that kernels can serve."""
    found: Policy = recipe_of(request.param).policies(facts(llama.config))[-1]
    return found


def draw(rows: int, count: int, seed: int = 0, heads: int = HEADS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, count, DIM, generator=generator)


def plain(policy: Policy) -> Rows:
    return Rows(policy, sites(0, None, {}))


def fused(policy: Policy, pads: Sequence[int]) -> FusedRows:
    return FusedRows(policy, list(pads), Workspace())


def given(batch: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, Hq, n, D], keys and values [B, H, n, D]."""
    heads = (HEADS * SHARE, HEADS, HEADS)
    query, keys, values = (draw(batch, count, seed + i, own) for i, own in enumerate(heads))
    return query, keys, values


def play(rows: Any, sizes: Sequence[int], batch: int, seed: int = 0) -> Tensor:
    """Runs chunks through rows; returns all answers."""
    total = sum(sizes)
    query, keys, values = given(batch, total, seed)
    out, end = [], 0
    for size in sizes:
        start, end = end, end + size
        q, k, v = (x[:, :, start:end] for x in (query, keys, values))
        out.append(rows.attend(q, k, v, None, None))
        assert out[-1].shape == q.shape
    return torch.cat(out, 2)


def held(rows: Any) -> list[Tensor]:
    return list(rows.read(torch.float32))


SIZES = ([300, *[1] * 150], [5, *[1] * 200], [40, 90, 1, 1, 200, 3], [1, 1, 1, 130, 64, *[1] * 70])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fused_rows_answer_as_plain_rows_do(policy: Policy, sizes: list[int]) -> None:
    ours, theirs = fused(policy, [0, 0]), plain(policy)
    torch.testing.assert_close(play(ours, sizes, 2), play(theirs, sizes, 2), atol=2e-5, rtol=2e-5)
    assert ours.seen == theirs.seen
    for one, two in zip(held(ours), held(theirs), strict=True):
        close = (one - two).abs().amax((0, 1, 3)) == 0
        # what has just left the window is paged at once here, and with the next token there
        assert int((~close).sum()) in (0, policy.block)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_row_of_a_padded_batch_is_as_the_row_alone(policy: Policy, sizes: list[int]) -> None:
    sizes = [sizes[0] + 80, *sizes[1:]]
    pads = [70, 0, 3]
    together = play(fused(policy, pads), sizes, 3)
    for row, pad in enumerate(pads):
        alone = plain(policy)
        own = [x[row : row + 1] for x in given(3, sum(sizes), 0)]
        out, start = [], pad
        for end in itertools.accumulate(sizes):
            out.append(alone.attend(*(x[:, :, start:end] for x in own), None, None))
            start = end
        found = together[row : row + 1, :, pad:]
        torch.testing.assert_close(found, torch.cat(out, 2), atol=2e-5, rtol=2e-5)


def grown(
    policy: Policy, sizes: Sequence[int] = (200, *[1] * 40), pads: Sequence[int] = (0, 0, 0)
) -> FusedRows:
    rows = fused(policy, pads)
    play(rows, sizes, 3)
    return rows


def step(rows: FusedRows, seed: int) -> Tensor:
    return rows.attend(*given(3, 1, seed), None, None)


@pytest.mark.parametrize("pads", [(0, 0, 0), (0, 110, 120)], ids=str)
def test_a_fork_and_the_first_leave_each_other_as_they_were(
    policy: Policy, pads: tuple[int, ...]
) -> None:
    """Also where a shorter row has room for pages among those that are shared."""
    first, same = grown(policy, pads=pads), grown(policy, pads=pads)
    twin, alike = first.fork(), grown(policy, pads=pads)
    for seed in range(100, 240):
        torch.testing.assert_close(step(twin, seed), step(alike, seed))
        torch.testing.assert_close(step(first, 1000 + seed), step(same, 1000 + seed))


def test_a_fork_goes_on_as_the_first_does(policy: Policy) -> None:
    rows = grown(policy)
    twin = rows.fork()
    for seed in range(100, 250):
        torch.testing.assert_close(step(twin, seed), step(rows, seed))


def test_selected_rows_go_on_as_themselves(policy: Policy) -> None:
    rows = grown(policy)
    chosen = rows.select(torch.tensor([2, 0, 2]))
    for seed in range(100, 200):
        fresh = given(3, 1, seed)
        out = rows.attend(*fresh, None, None)
        order = [2, 0, 2]
        found = chosen.attend(*(x[order] for x in fresh), None, None)
        torch.testing.assert_close(found, out[order])


def test_a_crop_takes_back_what_is_exact_and_no_more(recipe_of: Any, llama: Any) -> None:
    policy = recipe_of("k4v2-windowed").policies(facts(llama.config))[-1]
    rows, never = grown(policy), grown(policy)
    for seed in range(100, 110):
        step(rows, seed)
    rows.crop(10)
    for seed in range(200, 260):
        torch.testing.assert_close(step(rows, seed), step(never, seed))
    with pytest.raises(UnsupportedError, match="only the last"):
        rows.crop(rows.exact + 1)


def test_room_that_was_reserved_is_not_made_again(policy: Policy) -> None:
    rows = grown(policy)
    rows.reserve(2000)
    held = rows.nbytes
    for seed in range(100, 300):
        step(rows, seed)
    assert rows.nbytes == held


def test_bytes_are_those_of_plain_rows_and_one_ring(policy: Policy) -> None:
    ours, theirs = fused(policy, [0, 0]), plain(policy)
    keys, values = draw(2, 3000, 1), draw(2, 3000, 2)
    ours.fill(keys, values)
    theirs.fill(keys, values)
    ring = ours.window.ring + ours.window.sinks
    token = 2 * HEADS * DIM * keys.element_size()
    for mine, other in zip(ours.nbytes, theirs.nbytes, strict=True):
        assert 0 <= mine - other <= ring * token + 100


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_capped_logits_and_other_scales_are_passed_on(
    policy: Policy, softcap: float | None
) -> None:
    ours, theirs = fused(policy, [0]), plain(policy)
    for count in (150, 1, 5):
        fresh = (*given(1, count, 3), 0.3, softcap)
        torch.testing.assert_close(ours.attend(*fresh), theirs.attend(*fresh), atol=2e-5, rtol=2e-5)


def test_a_model_answers_the_same_through_kernels(model_of: Any, recipe_of: Any, draw: Any) -> None:
    """In bfloat16, with a padded row; on a CPU under Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of("llama").to(device, torch.bfloat16)
    tokens, mask = draw(2, 140).to(device), torch.ones(2, 140, dtype=torch.long, device=device)
    mask[1, :30] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    found = {}
    for name in ("reference", "triton"):
        with implementation(name), torch.no_grad():
            cache = load(recipe_of("k4v2-windowed"), model)
            out = []
            for start, end in ((0, 137), (137, 138), (138, 139), (139, 140)):
                given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
                inputs = tokens[:, start:end]
                out.append(model(inputs, past_key_values=cache, **given).logits)
            found[name] = torch.cat(out, 1).float()[mask.bool()]
    assert {type(group.rows) for group in cache.layers[0].groups} == {FusedRows}
    error = (found["triton"] - found["reference"]).norm() / found["reference"].norm()
    assert error <= 0.03
