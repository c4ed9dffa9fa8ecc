"""Spots: what selectors and mergers may know of the layers of a model, beside their caches."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kvtune.errors import UnsupportedError
from kvtune.models import facts
from kvtune.policy import Policy
from kvtune.rope import Rope
from kvtune.view import Spot

_OUTPUT = re.compile(r"\.(\d+)\.\w*att\w*\.(?:o_proj|dense|out_proj|c_proj)$")


def outputs(model: Any) -> dict[int, Tensor]:
    """The output projection [Hq, D, E] of each full-attention layer, a view of its weight.

    Raises:
        UnsupportedError: a model that names it in a way that kvtune does not know.
    """
    known = facts(model.config)
    found = {}
    for name, module in model.named_modules():
        if (layer := _OUTPUT.search(name)) and int(layer[1]) in known.compressible():
            heads = known.layers[int(layer[1])].query_heads
            found[int(layer[1])] = module.weight.detach().T.unflatten(0, (heads, -1))
    if missing := set(known.compressible()) - found.keys():
        raise UnsupportedError(
            f"{type(model).__name__} names the output projection of layer {min(missing)} in a way "
            "that kvtune does not know.",
            "Use a selector that does without: kvtune methods",
        )
    return found


def spots(
    model: Any,
    policies: Sequence[Policy],
    ropes: Mapping[int, Rope],
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[int, Spot]:
    """The spot of each layer that selects tokens, of tensors "layer.3.select.METHOD.NAME".

    Raises:
        UnsupportedError: a selector wants an output projection that is not found.
    """
    needs = frozenset[str]().union(*(own.needs for own in policies if own.select))
    projections = outputs(model) if "output" in needs else {}
    found = {}
    for layer, policy in enumerate(policies):
        if policy.select is None:
            continue
        stem = f"layer.{layer}.select."
        own = {
            name.removeprefix(stem): x
            for name, x in (tensors or {}).items()
            if name.startswith(stem)
        }
        output = projections.get(layer) if "output" in policy.needs else None
        found[layer] = Spot(layer, len(policies), own, ropes.get(layer), output)
    return found
