"""In-cache positions: tiers whose keys are turned by their place in the cache, for endless text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtune.held import Pair
from kvtune.pages import MakeSite
from kvtune.policy import Policy
from kvtune.rope import Rope
from kvtune.tiers import Tiers
from kvtune.view import Observed, Spot


class InCache(Tiers):
    """Tiers in which the n tokens that are held stand at positions 0 ... n - 1, whatever was
    between them (StreamingLLM, arXiv:2309.17453; LaCache, arXiv:2507.14204).

    So no distance exceeds what a cache holds, and a text may be longer than a model's positions.
    Keys are stored as they were before the rotary embedding, turned back once, when they arrive,
    and turned as they are read; queries are turned back from their true positions and on to the
    last places of the cache. All turns are in float32 from what is stored, so none adds up.

    While nothing has been dropped, these are the true positions; so a prompt is read as the model
    would, and must not be longer than its positions. What a selector sees are keys before RoPE.
    """

    def __init__(
        self, policy: Policy, sites: tuple[MakeSite, MakeSite], spot: Spot | None = None
    ) -> None:
        super().__init__(policy, sites, spot)
        rope = sites[0](torch.arange(0), torch.float32).rope
        assert rope is not None, "load() gives every layer that needs it a rope"
        self._rope: Rope = rope

    def fill(self, keys: Tensor, values: Tensor, observed: Observed) -> None:
        """Takes a context [B, H, T, D] that was computed densely, as a prompt's forward would leave
        it: keys are turned by their true positions."""
        positions = torch.arange(keys.shape[2], device=keys.device)
        super().fill(self._rope.unturn(keys, positions), values, observed)

    def read(self, dtype: torch.dtype) -> Pair:
        """Keys and values [B, H, n, D] as the next query reads them, keys turned by their places;
        the query stands at the place n."""
        keys, values = super().read(dtype)
        return self._rope.turn(keys, range(keys.shape[2])), values

    @property
    def held(self) -> int:
        """Tokens that are held: the place of the next one."""
        sinks = self._sinks[0].shape[2] if self._sinks else 0
        return sinks + sum(keys.tokens for keys, _ in self.tiers) + self._last

    def _read_on(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        count = query.shape[2]
        wide = torch.promote_types(query.dtype, torch.float32)
        both = torch.cat([query.to(wide), keys.to(wide)], 1)
        bare = self._rope.unturn(both, range(self.seen, self.seen + count))
        asked, stored = bare.split([query.shape[1], keys.shape[1]], 1)
        placed = self._rope.turn(asked, range(self.held, self.held + count)).to(query.dtype)
        out = super()._read_on(placed, stored.to(keys.dtype), values, scale, softcap)
        if self._spot.layer == self._spot.layers - 1:
            self._rope.forget()  # the next step has other places
        return out

    def _needs(self, what: str) -> bool:
        return what != "rope" and super()._needs(what)  # no codec reads true positions here


def endless(policies: Sequence[Policy]) -> bool:
    """Whether a text may be longer than a model's positions: all of these layers hold a set number
    of tokens, at their places in the cache."""
    own = [group.select for policy in policies for group in policy.heads]
    selectors = [*own, *(policy.select for policy in policies)]
    return all(select and select.budget and select.in_cache for select in selectors)
