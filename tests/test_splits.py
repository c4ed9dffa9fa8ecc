"""Laws of kvtune/splits.py: whole blocks near a share, and a partition in which the largest win."""

from __future__ import annotations

import pytest
import torch

from kvtune.parts import find, legal_values
from kvtune.splits import LEAST, NEAR, Split, gathered, parted, smallest

SHARES = [float(share) for share in legal_values(find("attention"), "share")]
BLOCKS = [(1, 1), (1, 64), (64, 1), (64, 64), (128, 64), (1, 128)]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("share", SHARES)
def test_a_split_is_near_its_share_in_whole_blocks(share: float, blocks: tuple[int, int]) -> None:
    split = smallest(share, *blocks)
    assert split.kept > 0
    assert split.kept % blocks[0] == split.rest % blocks[1] == 0
    assert abs(split.kept / split.block - share) <= NEAR
    assert split.block >= LEAST or share == 1


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.5, 0.75])
def test_no_smaller_rest_would_do(share: float, blocks: tuple[int, int]) -> None:
    split = smallest(share, *blocks)
    for rest in range(blocks[1], split.rest + 1, blocks[1]):
        for kept in range(blocks[0], split.block + blocks[0], blocks[0]):
            error = abs(kept / (kept + rest) - share)
            if rest == split.rest:
                assert error >= abs(split.kept / split.block - share), "it is the nearest one"
            elif error <= NEAR:
                assert kept + rest < LEAST


def test_everything_kept_leaves_no_rest() -> None:
    assert smallest(1.0, 64, 128) == Split(64, 0)


@pytest.mark.parametrize("kept", [0, 1, 7, 20])
def test_the_largest_win_and_every_token_is_in_one_part(kept: int) -> None:
    score = torch.rand(3, 2, 20, generator=torch.Generator().manual_seed(0))
    won, lost = parted(score, kept)
    assert won.shape[-1] == kept
    both = torch.cat([won, lost], -1)
    assert torch.equal(both.sort(-1).values, torch.arange(20).expand(3, 2, 20))
    assert all(torch.equal(part, part.sort(-1).values) for part in (won, lost))
    if 0 < kept < 20:
        worst, best = score.gather(-1, won).amin(-1), score.gather(-1, lost).amax(-1)
        assert (worst > best).all()


def test_of_equal_scores_the_later_token_wins() -> None:
    won, lost = parted(torch.tensor([[[1.0, 2.0, 1.0, 1.0, 2.0, 0.0]]]), 3)
    assert won.tolist() == [[[1, 3, 4]]]
    assert lost.tolist() == [[[0, 2, 5]]]


def test_each_head_gathers_its_own_tokens() -> None:
    x = torch.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4)
    places = torch.tensor([[[0, 4], [1, 2], [3, 4]], [[2, 3], [0, 1], [1, 4]]])
    found = gathered(x, places)
    for b in range(2):
        for h in range(3):
            assert torch.equal(found[b, h], x[b, h, places[b, h]])
