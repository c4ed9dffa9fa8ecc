"""Reading: which methods GPU kernels read, which they fold away, and which plain torch decodes."""

from __future__ import annotations

import itertools
from typing import Literal

from kvtune import parts
from kvtune.parts import Codec, Part, legal_values

Reading = Literal["folded", "kernels", "some settings", "plain torch"]


def reading(kind: type[Part], head_dim: int = 128) -> Reading:
    """How a GPU reads a method, over all its settings that fit a head of this size.

    "folded" codecs are taken out of the loop into queries and outputs; what only "plain torch"
    decodes has no place in a latency table, since it is slower than 16 bits.
    """
    if not issubclass(kind, Codec):
        return "plain torch"
    if kind.linear:
        return "folded"
    found = {codec.format(head_dim) is not None for codec in _fitting(kind, head_dim)}
    if found == {True}:
        return "kernels"
    return "some settings" if True in found else "plain torch"


def readings(head_dim: int = 128) -> dict[str, Reading]:
    """The same of every method."""
    return {name: reading(parts.find(name), head_dim) for name in parts.names()}


def _fitting(kind: type[Codec], head_dim: int) -> list[Codec]:
    legal = {}
    for name in kind.model_fields:
        try:
            legal[name] = legal_values(kind, name)
        except ValueError:
            continue  # without a mark it keeps its default
    found = []
    for values in itertools.product(*legal.values()):
        codec = kind(**dict(zip(legal, values, strict=True)))
        for side in ("keys", "values"):
            try:
                codec.check(head_dim, side)
            except ValueError:
                continue
            found.append(codec)
    return found
