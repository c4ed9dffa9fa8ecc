"""Where the laws of methods put a codec to work."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from method_cases import draw, fitted, home

from kvtune.models import ropes
from kvtune.parts import Codec, Site
from kvtune.rope import Rope


@pytest.fixture
def rope_of(model_of: Any) -> Any:
    """Returns the rotary embedding of a real model of a head size."""

    @cache
    def make(dim: int) -> Rope:
        return ropes(model_of("llama", head_dim=dim, num_hidden_layers=1))[0]

    return make


@pytest.fixture
def place(rope_of: Any) -> Any:
    """Returns where a codec works: a Site of some tokens."""

    def make(codec: Codec, tokens: int, dtype: torch.dtype = torch.float32) -> Site:
        found = home(codec)
        assert found is not None
        rope = rope_of(found[0]) if "rope" in codec.needs else None
        side: Any = found[1]
        site = Site(0, side, torch.arange(5, 5 + tokens), dtype, rope, fitted(codec))
        learned = codec.learn(draw(codec, 256).to(dtype), site)
        return replace(
            site, tensors={**site.tensors, **{f"{codec.name()}.{k}": x for k, x in learned.items()}}
        )

    return make
