"""Laws of codes behind a projection: legal ranks and bits work, others are refused in words."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from method_cases import HEADS, drawn, seen

from kvtune.chains import Chain
from kvtune.methods.kvtc import Kvtc
from kvtune.methods.svd import Svd
from kvtune.methods.waterfill import Waterfill
from kvtune.parts import Codec, Site, legal_values

DIM, TOKENS = 16, 128
RANKS = legal_values(Svd, "rank")
TOGETHER = (1, 2, "all")
PLANES = [Waterfill(bits=bits, group=64) for bits in (1.0, 2.0, 3.0)]
BITS: list[Codec] = [*PLANES, *(Kvtc(bits=bits) for bits in (2.0, 4.0))]


def place(chain: Chain, side: Any = "keys") -> Site:
    """Where a chain works, fitted as `fit` does it: each codec to what is left by those before."""
    own, found = seen(DIM, side), {}
    site = Site(0, side, torch.arange(TOKENS), torch.float32)
    for codec in chain.codecs:
        found |= {f"{codec.name()}.{name}": x for name, x in codec.fit(own).items()}
        site = replace(site, tensors=found)
        if codec is not chain.codecs[-1]:
            own = codec.behind(own, site)
    return replace(site, tensors={**found, **chain.begin(drawn(DIM, TOKENS), site)[1]})


def error(chain: Chain, site: Site) -> float:
    x = drawn(DIM, TOKENS)
    return float((chain.decode(chain.encode(x, site), site) - x).norm() / x.norm())


@pytest.mark.parametrize("basis", ["prompt", "calibrated"])
@pytest.mark.parametrize("together", TOGETHER)
def test_every_rank_and_bits_work_or_are_refused_in_words(basis: Any, together: Any) -> None:
    works = 0
    for rank, last in itertools.product(RANKS, BITS):
        projection = Svd(rank=rank, heads=together, basis=basis)
        chain = Chain((projection, last))
        groups, width = projection.shape(HEADS, DIM)
        try:
            chain.check(HEADS, DIM, "keys")
        except ValueError as refused:
            assert str(width) in str(refused) and last.name() in str(refused)
            continue
        works += 1
        code = chain.encode(drawn(DIM, TOKENS), place(chain))
        stored = 8 * code.body.nbytes / (2 * groups * TOKENS * width)
        assert stored == pytest.approx(last.payload_bits, rel=0.04)
    assert works >= len(BITS)


@pytest.mark.parametrize("basis", ["prompt", "calibrated"])
def test_components_that_get_no_bits_need_no_basis(basis: Any) -> None:
    """A rank that holds what water-filling keeps is as good as the whole width, at equal bits."""
    narrow = Chain((Svd(rank=0.5, basis=basis), Waterfill(bits=2.0, group=64)))
    whole = Chain((Svd(rank=1.0, basis=basis), Waterfill(bits=1.0, group=64)))
    assert error(narrow, place(narrow)) <= 1.05 * error(whole, place(whole))


def test_heads_together_are_coded_better_than_heads_apart_where_they_know_each_other() -> None:
    x = drawn(DIM, TOKENS)
    x[:, 1:] = x[:, :1] + 0.1 * x[:, 1:]
    own = seen(DIM, "keys")
    flat = x.transpose(1, 2).flatten(2).flatten(0, 1).double()
    centred = flat - flat.mean(0)
    together = centred.T @ centred / len(flat)
    blocks = together.unflatten(0, (HEADS, DIM)).unflatten(2, (HEADS, DIM))
    covariance = torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)
    mean = flat.mean(0).unflatten(0, (HEADS, DIM))
    own = replace(own, mean=mean, covariance=covariance, together=together)
    left = []
    for heads in (1, "all"):
        chain = Chain(
            (Svd(rank=1.0, heads=heads, basis="calibrated"), Waterfill(bits=1.0, group=64))
        )
        found = {f"svd.{name}": t for name, t in chain.codecs[0].fit(own).items()}
        site = Site(0, "keys", torch.arange(TOKENS), torch.float32, None, found)
        fitted = chain.codecs[1].fit(chain.codecs[0].behind(own, site))
        site = replace(site, tensors={**found, "waterfill.planes": fitted["planes"]})
        left.append(float((chain.decode(chain.encode(x, site), site) - x).norm()))
    assert left[1] < 0.7 * left[0]
