"""Laws of the codes of packed caches: within a step, near their entropy, finest at the end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtune.packing import coding, kvtc


@pytest.mark.parametrize("tokens", [1, 7, 8, 100, 511, 512, 2000])
def test_bands_cover_all_tokens_once_and_are_finest_at_the_end(tokens: int) -> None:
    found = coding.bands(tokens)
    assert [band.start for band in found] == [0, *(band.stop for band in found[:-1])]
    assert found[-1].stop == tokens
    halves = [band.half for band in found]
    assert halves == sorted(halves)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 30.0, 3000.0])
def test_codes_are_within_the_dead_zone_of_a_step(scale: float) -> None:
    z = torch.randn(600, 40) * scale * torch.logspace(0, -2, 40)
    data = coding.encode(z, 0.5)
    found, live = coding.decode(data, 600, 40, 0.5)
    whole = torch.zeros_like(z)
    whole[:, live] = found
    allowed = coding.steps(600, 0.5)[:, None] * coding.DEAD_ZONE * (1 + 1e-4)
    assert ((whole - z).abs() <= allowed + z.abs() * 1e-6).all()


def test_codes_take_hardly_more_than_their_entropy() -> None:
    z = torch.randn(4000, 64) * torch.logspace(0.5, -1.5, 64)
    codes = coding._quantised(z, coding.steps(4000, 1.0))
    entropy = 0.0
    for start, stop, _ in coding.bands(4000):
        for row in codes[:, start:stop]:
            counts = np.unique(row, return_counts=True)[1]
            entropy -= float((counts * np.log2(counts / counts.sum())).sum())
    assert 8 * len(coding.encode(z, 1.0)) < 1.04 * entropy + 8 * 600


def test_silent_components_take_almost_nothing() -> None:
    quiet, loud = torch.randn(100, 500) * 1e-3, torch.randn(100, 10)
    both = coding.encode(torch.cat([loud, quiet], 1), 1.0)
    assert len(both) < len(coding.encode(loud, 1.0)) + 40


def test_kvtcs_codes_leave_half_a_step_of_their_group() -> None:
    z = torch.randn(50, 96) * torch.logspace(0, -2, 96)
    groups = kvtc.allotted(torch.logspace(0, -2, 96), 500)
    found = kvtc.decode(kvtc.encode(z, groups, 1.0), 50, groups, 1.0)
    start = 0
    for size, bits in groups:
        part, other = z[:, start : start + size], found[:, start : start + size]
        span = part.amax(1) - part.amin(1)
        worst = span / (2**bits - 1) * 0.51 + part.abs().amax(1) * 2e-3 if bits else None
        assert worst is None or ((part - other).abs().amax(1) <= worst).all()
        assert bits or not other.any()
        start += size
