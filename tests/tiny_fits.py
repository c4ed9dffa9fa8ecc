"""What the codecs of a recipe are fitted to on a tiny model: moments of random text."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvtune.bank import build
from kvtune.calibrate import find_ropes
from kvtune.fit import Fitter, fitted
from kvtune.models import facts
from kvtune.moments import Moments, pulled
from kvtune.prices import pulls
from kvtune.profile import Profile
from kvtune.recipe import Recipe


def fits_of(recipe: Recipe, model: Any) -> dict[str, Tensor]:
    """Returns the tensors that a recipe's codecs read, fitted to what a tiny model makes."""
    policies = recipe.policies(facts(model.config))
    if not any(codec.fits for p in policies for chain in p.chains for codec in chain.codecs):
        return {}
    return fitted(policies, Fitter(seen_by(model)))


@cache
def seen_by(model: Any) -> Profile:
    """Returns what a fit needs of a model's profile: moments and samples of random text."""
    own, ropes = model.config._attn_implementation, find_ropes(model)
    tokens = torch.randint(3, 61, (2, 80), generator=torch.Generator().manual_seed(3))
    moments = Moments(ropes)
    bank = build(model, tokens, 64, observe=moments.observe)
    found = pulls(model, bank, seed=0)
    model.set_attn_implementation(own)
    kv_heads = {i: bank.facts.layers[i].kv_heads for i in found}
    reads = pulled({i: (pull.out, pull.gradient) for i, pull in found.items()}, kv_heads)
    return Profile((), {**moments.tensors(256), **reads}, {"layers": sorted(found)})


def cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors of a cache's own, so that their bytes are its own too."""
    return {name: x.clone() for name, x in tensors.items()}
