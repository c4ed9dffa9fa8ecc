"""Lent caches: a layer that others read as well, and the layers that read it."""

from __future__ import annotations

from typing import Any

import torch
from kvtune_kernels import say_once
from torch import Tensor

from kvtune.attention import Reading
from kvtune.layer import CompressedLayer, Shared
from kvtune.pages import MakeSite
from kvtune.policy import Policy
from kvtune.rows import Rows
from kvtune.view import Observed


class LendingLayer(CompressedLayer):
    """A layer whose tokens leave the window when the last of its borrowers has read them.

    So a prompt is read exactly by all of them, and later tokens as the owner reads them. Borrowers
    are layers that a recipe names, or those of a model that hands a layer's keys on by itself: in
    either case attention asks again without an `update`.
    """

    def __init__(
        self,
        policy: Policy,
        sites: tuple[MakeSite, MakeSite],
        borrowers: int,
        shared: Shared | None = None,
    ) -> None:
        super().__init__(policy, sites, shared)
        self._borrowers, self._answered = borrowers, 0

    def attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Answers query [B, Hq, n, D] on the layer's own device; borrowers may live elsewhere."""
        return super().attend(query.to(self.device), mask, scale, softcap).to(query.device)

    def _attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        if self._incoming is not None:
            self._take(*self._admitted(mask))
        out = torch.zeros_like(query)
        for members, pads, rows in self._plain():
            skip = self._skipped(pads[0], query.shape[2])
            asked = query[members][:, :, skip:]
            out[members, :, skip:] = rows.answer(asked, scale, softcap)
        self._answered += 1
        if self._answered > self._borrowers:
            for _, _, rows in self._plain():
                rows.settle()
        return out

    def fork(self) -> LendingLayer:
        """A copy-on-write twin."""
        twin = LendingLayer(self.policy, self._sites, self._borrowers, self._shared)
        self._hand_over(twin)
        return twin

    def _take(self, keys: Tensor, values: Tensor) -> None:
        self._answered = 0
        for members, pads, rows in self._plain():
            skip = self._skipped(pads[0], keys.shape[2])
            rows.take(*(x[members][:, :, skip:] for x in (keys, values)))

    def _skipped(self, pad: int, count: int) -> int:
        """How many of the last tokens are padding."""
        return max(0, pad - (self.seen - count))

    def _plain(self) -> list[tuple[list[int], list[int], Rows]]:
        return [
            (members, pads, rows)
            for members, pads, rows in self.groups
            if isinstance(rows, Rows)  # all are: kernels append and answer at once
        ]

    def _fuses(self, keys: Tensor) -> bool:
        if keys.is_cuda:
            say_once("Kernels read no layer whose cache is lent; it runs in plain torch.")
        return False


class BorrowingLayer(CompressedLayer):
    """A layer that stores nothing: attention is handed a reading of its owner's cache."""

    def __init__(self, policy: Policy, owner: CompressedLayer) -> None:
        super().__init__(policy, owner._sites, owner._shared)
        self.owner = owner

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Reading, Reading]:
        """Leaves the layer's own keys and values [B, H, n, D] aside."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        return Reading(self.owner), Reading(self.owner)

    def fill(self, keys: Tensor, values: Tensor, observed: Observed | None = None) -> None:
        """Notes how long the context [B, H, T, D] is."""
        self.begin(keys)

    def fork(self) -> BorrowingLayer:
        """A twin that reads the same owner still."""
        return self.fork_of(self.owner)

    def fork_of(self, owner: CompressedLayer) -> BorrowingLayer:
        """A twin that reads another owner."""
        twin = BorrowingLayer(self.policy, owner)
        self._hand_over(twin)
        return twin

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets how many there were; the owner, which comes first, refuses what is too many."""
        self.seen += min(0, tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """The owner's rows follow."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """The owner's rows follow."""
