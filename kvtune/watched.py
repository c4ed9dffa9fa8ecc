"""Watched: dense cache layers that show the queries and keys that attention meets on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from kvtune_kernels import attend
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvtune.attention import Reading, causal


class Sight(NamedTuple):
    """What attention meets on a layer: queries of the last n tokens, and all keys with theirs."""

    query: Tensor  # [B, Hq, n, D]
    keys: Tensor  # [B, H, T, D]
    scale: float | None
    softcap: float | None


class Show(Protocol):
    """Takes what passes on a layer."""

    def __call__(self, layer: int, sight: Sight) -> None: ...


class Watched(DynamicLayer):
    """A dense layer that shows what passes; a forward that another layer reads shows once."""

    def __init__(self, layer: int, show: Show) -> None:
        super().__init__()
        self._layer, self._show, self._shown = layer, show, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Reading, Reading]:
        """Stores densely and hands out a Reading."""
        super().update(key_states, value_states)
        self._shown = False
        return Reading(self), Reading(self)

    def attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Answers query [B, Hq, n, D] exactly; rows are not padded."""
        if not self._shown:
            self._show(self._layer, Sight(query, self.keys, scale, softcap))
            self._shown = True
        count = query.shape[2]
        seen = causal(count, self.keys.shape[2], query.device) if count > 1 else None
        return attend(query, self.keys, self.values, seen, scale, softcap)


def going_on(layers: Sequence[Any], held: Mapping[int, tuple[Tensor, Tensor]], show: Show) -> Cache:
    """A cache that goes on from a context: `held` has the keys and values [B, H, T, D] of those of
    its layers that are watched; of the others it has twins. Neither is written into."""
    twins = []
    for index, layer in enumerate(layers):
        if index in held:
            twin = Watched(index, show)
            twin.lazy_initialization(*held[index])
            twin.keys, twin.values = held[index]
        else:
            twin = copy.copy(layer)  # an update replaces its tensors
        twins.append(twin)
    return Cache(layers=twins)
