"""Laws of kvtc: records of one length, groups that fit them, and what a spectrum is worth."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvtune.allotting import SIDE, SIZES
from kvtune.chains import Chain
from kvtune.methods.kvtc import FIRST, TYPES, Kvtc
from kvtune.methods.svd import Svd
from kvtune.parts import Seen, Site

HEADS, DIM, TOKENS = 3, 64, 256
BITS = (1.0, 2.0, 3.0, 4.0)


def falling(heads: int = HEADS, dim: int = DIM, steep: float = 5.0) -> Tensor:
    """Tokens [1, H, T, D] whose components fall, the strongest first."""
    spread = torch.exp(-steep * torch.arange(dim) / dim)
    noise = torch.randn(1, heads, TOKENS, dim, generator=torch.Generator().manual_seed(0))
    return noise * spread


def seen(x: Tensor) -> Seen:
    """What calibration sees of tokens [1, H, T, D]."""
    own = x[0].double()
    centred = own - own.mean(1, keepdim=True)
    covariance = centred.transpose(1, 2) @ centred / own.shape[1]
    eye = torch.eye(own.shape[2]).double().expand(own.shape[0], -1, -1)
    flat = centred.transpose(0, 1).flatten(1)
    together = flat.T @ flat / own.shape[1]
    return Seen(own.mean(1), covariance, eye, own, eye, own, True, together)


def place(codec: Kvtc, x: Tensor, fit_on: Tensor | None = None) -> Site:
    """Where it works, fitted to what it is given or to something else."""
    found = codec.fit(seen(x if fit_on is None else fit_on))
    named = {f"kvtc.{name}": own for name, own in found.items()}
    return Site(0, "keys", torch.arange(x.shape[2]), torch.float32, None, named)


def error(codec: Kvtc, x: Tensor, site: Site) -> float:
    return float((codec.decode(codec.encode(x, site), site) - x).norm() / x.norm())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [24, 64, 192])
def test_groups_and_their_scales_fit_into_a_record(bits: float, dim: int) -> None:
    codec, x = Kvtc(bits=bits), falling(dim=dim)
    for row in place(codec, x).tensors["kvtc.groups"].tolist():
        stored = [own & ~FIRST for own in row]
        starts = [i for i, own in enumerate(row) if own & FIRST]
        assert sum(stored) + SIDE * len(starts) <= 8 * codec.record(dim)
        assert set(stored) <= set(TYPES)
        for start, after in itertools.pairwise([*starts, dim]):
            size = len(list(itertools.takewhile(bool, stored[start:after])))
            assert size in SIZES
            assert len(set(stored[start : start + size])) == 1


@pytest.mark.parametrize("bits", BITS)
def test_a_record_has_so_many_bits_whatever_its_groups_are(bits: float) -> None:
    codec = Kvtc(bits=bits)
    for steep in (0.0, 2.0, 9.0):
        x = falling(steep=steep)
        body, side = codec.encode(x, place(codec, x))
        assert (body.dtype, side) == (torch.uint8, ())
        assert 8 * body.nbytes == bits * x.numel()


def test_a_token_is_what_it_is_alone() -> None:
    codec, x = Kvtc(bits=2.0), falling()
    site = place(codec, x)
    whole = codec.encode(x, site).body
    assert torch.equal(codec.encode(x[:, :, 100:101], site).body, whole[:, :, 100:101])


@pytest.mark.parametrize("bits", BITS)
def test_groups_found_for_a_spectrum_serve_it_better_than_groups_for_another(bits: float) -> None:
    codec, x = Kvtc(bits=bits), falling(steep=9.0)
    own, other = place(codec, x), place(codec, x, fit_on=falling(steep=9.0).flip(-1))
    assert error(codec, x, own) < 0.7 * error(codec, x, other)


def test_heads_have_groups_of_their_own() -> None:
    codec = Kvtc(bits=2.0)
    x = torch.cat([falling(heads=1, steep=9.0), falling(heads=1, steep=0.0)], 1)
    x[:, 1] *= 0.05
    own, swapped = place(codec, x), place(codec, x, fit_on=x.flip(1))
    assert error(codec, x, own) < 0.8 * error(codec, x, swapped)


@pytest.mark.parametrize("heads", [1, "all"])
def test_it_stands_behind_a_projection_of_heads_together(heads: int | str) -> None:
    projection = Svd(rank=0.5, heads=heads, basis="calibrated")
    codec, x = Kvtc(bits=3.0), falling()
    chain, own = Chain((projection, codec)), seen(x)
    chain.check(HEADS, DIM, "keys")
    tensors = {f"svd.{name}": t for name, t in projection.fit(own).items()}
    site = Site(0, "keys", torch.arange(TOKENS), torch.float32, None, tensors)
    found = codec.fit(projection.behind(own, site))
    site = Site(0, "keys", site.positions, torch.float32, None,
                {**tensors, **{f"kvtc.{name}": t for name, t in found.items()}})  # fmt: skip
    blank = chain.blanks(HEADS, DIM)["kvtc.groups"]
    assert found["groups"].shape == blank.shape
    code = chain.encode(x, site)
    assert 8 * code.body.nbytes == 3.0 * 0.5 * x.numel()
    assert float((chain.decode(code, site) - x).norm() / x.norm()) < 0.35


def test_a_record_too_short_for_any_group_is_refused() -> None:
    with pytest.raises(ValueError, match="24 bits for the 24 channels"):
        Kvtc(bits=1.0).check(24, "keys")
