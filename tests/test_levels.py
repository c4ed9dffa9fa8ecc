"""Laws of kvtune/levels.py: codebooks, packed trits and scales without bias."""

from __future__ import annotations

import pytest
import torch

from kvtune import levels

# Max (1960), table I
LEVELS = {
    2: (0.7980,),
    4: (0.4528, 1.510),
    8: (0.2451, 0.7560, 1.344, 2.152),
    16: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}


@pytest.mark.parametrize("count", LEVELS)
def test_levels_are_those_of_max(count: int) -> None:
    found = levels.lloyd_max(count)
    positive = LEVELS[count]
    assert found[count // 2 :] == pytest.approx(positive, abs=6e-4)
    assert found[: count // 2] == pytest.approx([-x for x in reversed(positive)], abs=6e-4)


@pytest.mark.parametrize("per_head", [False, True])
def test_the_nearest_level_is_found_and_looked_up(per_head: bool) -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    book = torch.tensor([-1.0, 0.1, 0.2, 2.0])
    books = torch.stack([book, book - 1, book * 2]) if per_head else book
    codes = levels.nearest(x, books)
    own = books[None, :, None, None] if per_head else books
    expected = (x.unsqueeze(-1) - own).abs().min(-1)
    assert torch.equal(codes.long(), expected.indices)
    torch.testing.assert_close((levels.looked_up(codes, books) - x).abs(), expected.values)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 96, 128])
def test_trits_come_back_and_take_five_to_a_byte(head_dim: int) -> None:
    codes = torch.randint(0, 3, (2, 1, 128, head_dim), generator=torch.Generator().manual_seed(1))
    pages = levels.stored_trits(codes.to(torch.uint8))
    assert pages.shape == (2, 1, 2, -(-64 * head_dim // 5))
    assert torch.equal(levels.restored_trits(pages, head_dim).long(), codes)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_an_unbiased_scale_reads_each_group_as_itself_on_average(scale: float) -> None:
    x = scale * torch.randn(3, 2, 40, 64, generator=torch.Generator().manual_seed(2))
    read = x.sign()
    found = levels.unbiased(x, read, -1).float() * read
    torch.testing.assert_close((found * x).sum(-1), (x * x).sum(-1), rtol=2e-3, atol=0)
    nothing = torch.zeros(1, 1, 4, 64)
    assert levels.unbiased(nothing, nothing, -1).abs().max() == 0


def test_averages_over_tokens_keep_a_bias_and_not_the_noise() -> None:
    """Why the scale is not the one of least squared error."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 1, 4096, 64, generator=generator) + 0.5
    read = x.sign()
    least = (x * read).mean(-1, keepdim=True) * read
    free = levels.unbiased(x, read, -1).float() * read
    target = (x * x).sum(-1).mean()
    assert ((free * x).sum(-1).mean() - target).abs() < 0.01 * target
    assert ((least * x).sum(-1).mean() - target) < -0.2 * target
