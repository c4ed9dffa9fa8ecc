"""GroupedLayer: one layer's cache whose tokens are stored together with those of other layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvtune.attention import causal
from kvtune.bonds import Bond, Member
from kvtune.layer import Shared
from kvtune.lent import LendingLayer
from kvtune.pages import MakeSite
from kvtune.policy import Policy
from kvtune.rows import Rows


class GroupedRows(Rows):
    """Rows whose pages are a part of what a group of layers stores.

    What leaves the window joins when the last layer of the group has seen it, so a chunk reads
    exactly what leaves the window within it: position alone decides when chunks end where blocks do
    (`sharing.pieces`), as they do token by token.
    """

    keys: Member  # type: ignore[assignment]
    values: Member  # type: ignore[assignment]

    def __init__(
        self, policy: Policy, sites: tuple[MakeSite, MakeSite], members: tuple[Member, Member]
    ) -> None:
        super().__init__(policy, sites)
        self.keys, self.values = members

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Takes a context [B, H, T, D] that was computed densely, as a prompt's forward would
        leave it."""
        self.take(keys, values)
        self.settle()

    def _page(self, start: int) -> None:
        """Nothing is paged before it is read: other layers of the group have not seen it yet."""

    def _mask(self, query: Tensor, start: int) -> Tensor | None:
        count = query.shape[2]
        return causal(count, self.seen, query.device) if count > 1 else None


class GroupedLayer(LendingLayer):
    """A layer that is the index-th of a bond; models may hand its cache on as any other's."""

    def __init__(
        self,
        policy: Policy,
        sites: tuple[MakeSite, MakeSite],
        bond: Bond,
        index: int,
        borrowers: int = 0,
        shared: Shared | None = None,
    ) -> None:
        super().__init__(policy, sites, borrowers, shared)
        self._bond, self._index = bond, index

    def fork(self) -> GroupedLayer:
        """A copy-on-write twin, in a group with the twins of the other layers."""
        place = self._bond, self._index, self._borrowers
        twin = GroupedLayer(self.policy, self._sites, *place, self._shared)
        self._hand_over(twin)
        return twin

    def _fuses(self, keys: Tensor) -> bool:
        return False  # rows read latents by kernels of their own where they can

    def _rows(self, members: list[int], pad: int, keys: Tensor) -> Rows:
        return GroupedRows(self.policy, self._sites, self._bond.members(self._index, pad))


def bonded(
    policy: Policy,
    sites: tuple[tuple[MakeSite, MakeSite], ...],
    handed: Sequence[int],
    shared: Shared | None = None,
) -> list[GroupedLayer]:
    """Empty layers that store together under a policy, in order; of each is said how many others a
    model hands it on to."""
    bond = Bond(policy, sites)
    return [
        GroupedLayer(policy, own, bond, i, count, shared)
        for i, (own, count) in enumerate(zip(sites, handed, strict=True))
    ]
