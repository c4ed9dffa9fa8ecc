"""Every method over the settings that its marks allow, and what the laws draw for it."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvtune import parts
from kvtune.parts import Codec, Part, Seen, legal_values
from kvtune.retention import Selector

HEADS = 4
HEAD_DIMS = (128, 64, 256, 16)
MOST = 64  # settings in full product; a method with more is varied one setting at a time
SHARED = Selector.model_fields  # settings that all selectors have
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def marked(kind: type[Part]) -> dict[str, tuple[Any, ...]]:
    """Returns the legal values of each setting that has a mark."""
    found = {}
    for name in kind.model_fields:
        try:
            found[name] = legal_values(kind, name)
        except ValueError:
            continue  # without a mark it cannot be searched, and keeps its default
    return found


def settings(kind: type[Part]) -> list[Part]:
    """Returns the default and the legal variants of a method."""
    legal = marked(kind)
    full = list(itertools.product(*legal.values()))
    if len(full) <= MOST:
        varied = [dict(zip(legal, values, strict=True)) for values in full]
    else:
        varied = [{name: value} for name, values in legal.items() for value in values]
    return list(dict.fromkeys([kind(), *(kind(**chosen) for chosen in varied)]))


def home(part: Part) -> tuple[int, str] | None:
    """Returns the first head size and side that a part fits, if there is one."""
    for dim, side in itertools.product(HEAD_DIMS, ("keys", "values")):
        try:
            part.check(dim, side)
        except ValueError:
            continue
        return dim, side
    return None


def _tells(part: Part) -> bool:
    """Whether a part tells more than others: what all selectors have is varied for one of them."""
    shared = isinstance(part, Selector) and part.model_fields_set & SHARED.keys()
    return not shared or part.name() == "attention"


KINDS = {name: parts.find(name) for name in parts.names()}
ALL = [part for kind in KINDS.values() for part in settings(kind) if _tells(part)]
CODECS = [part for part in ALL if isinstance(part, Codec) and home(part)]


@cache
def fitted(codec: Codec) -> dict[str, Tensor]:
    """Returns the tensors that a codec finds in what `draw` draws."""
    found = home(codec)
    assert found is not None
    return {f"{codec.name()}.{name}": x for name, x in codec.fit(seen(*found)).items()}


@cache
def seen(dim: int, side: str) -> Seen:
    """Returns what calibration sees of `draw`, and of readers with scales of their own."""
    x = drawn(dim, 256).double()[0]  # [H, n, D]
    reads = torch.randn(HEADS, 256, dim, generator=torch.Generator().manual_seed(1)).double()
    reads = reads * torch.linspace(0.2, 3, dim).double()
    mean = x.mean(1)
    moment = reads.transpose(1, 2) @ reads / 256
    centred = x - mean[:, None]
    covariance = centred.transpose(1, 2) @ centred / 256
    flat = centred.transpose(0, 1).flatten(1)
    together = flat.T @ flat / 256
    return Seen(mean, covariance, moment, x, moment, reads, side == "keys", together)


def draw(codec: Codec, tokens: int, seed: int = 0) -> Tensor:
    """Returns values [2, 4, T, D] whose channels have scales and offsets of their own."""
    found = home(codec)
    assert found is not None
    return drawn(found[0], tokens, seed)


def drawn(dim: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread, offset = torch.randn(2, 1, HEADS, 1, dim, generator=generator)
    return torch.randn(2, HEADS, tokens, dim, generator=generator) * spread.exp() + 4 * offset
