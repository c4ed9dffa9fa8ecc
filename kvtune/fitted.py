"""Fitted tensors: their names in an artifact, and how they reach the sites where parts work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kvtune.errors import IntegrityError
from kvtune.models import Facts
from kvtune.pages import MakeSite
from kvtune.parts import Site
from kvtune.policy import Policy
from kvtune.rope import Rope

SELECT = "select"  # the side of tensors that a selector reads


def blanks(
    layer: int, policy: Policy, kv_heads: int, head_dim: int, query_heads: int = 0
) -> dict[str, Tensor]:
    """The tensors that a layer's parts read, without data: "layer.3.keys.METHOD.NAME" of codecs,
    "layer.3.select.METHOD.NAME" of a selector (without `query_heads` there are as many as kv
    heads); none of what several layers share."""
    if policy.share is not None:
        return {}
    found = {
        f"layer.{layer}.{side}.{name}": x
        for index, side in enumerate(("keys", "values"))
        for chain in dict.fromkeys(pair[index] for pair in policy.tiers)
        for name, x in chain.blanks(kv_heads, head_dim).items()
    }
    if (part := policy.select) is not None:
        own = part.blanks(query_heads or kv_heads, kv_heads, head_dim)
        found |= {f"layer.{layer}.{SELECT}.{part.name()}.{name}": x for name, x in own.items()}
    return found


def check(tensors: Mapping[str, Tensor], policies: Sequence[Policy], known: Facts) -> None:
    """Raises IntegrityError unless a recipe has exactly the tensors that its parts read."""
    wanted: dict[str, Tensor] = {}
    for i, (policy, layer) in enumerate(zip(policies, known.layers, strict=True)):
        wanted |= blanks(i, policy, layer.kv_heads, layer.head_dim, layer.query_heads)
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise IntegrityError(
            f"The recipe lacks its fitted tensors ({missing[0]} and so on).",
            "Run: kvtune fit RECIPE --profile profile.safetensors",
        )
    for name, x in tensors.items():
        if name not in wanted:
            raise IntegrityError(f"No part of the recipe reads the tensor {name}.")
        blank = wanted[name]
        if (x.shape, x.dtype) != (blank.shape, blank.dtype):
            shown = f"{list(x.shape)} of {x.dtype}, not {list(blank.shape)} of {blank.dtype}"
            raise IntegrityError(f"The tensor {name} is {shown}.")


def sites(
    layer: int, rope: Rope | None, tensors: Mapping[str, Tensor]
) -> tuple[MakeSite, MakeSite]:
    """What makes the Sites of a layer: of its keys, and of its values."""

    def maker(side: Any) -> MakeSite:
        own = of_side(layer, side, tensors)
        return lambda positions, dtype: Site(layer, side, positions, dtype, rope, own)

    return maker("keys"), maker("values")


def of_side(layer: int, side: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors "METHOD.NAME" of the keys, the values or the selector of a layer."""
    prefix = f"layer.{layer}.{side}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
