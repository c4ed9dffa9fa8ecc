"""Beside: what is known of the tokens that compete in a layer, and travels with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class Beside:
    """Tensors of the tokens that compete again and then of the window, each where it is wanted."""

    sums: Tensor | None = None  # [B, H, n], the attention that they got
    marks: Tensor | None = None  # bool [B, H, n], of tokens that go before others
    places: Tensor | None = None  # int32 [B, H, n], true positions of what is kept
    queries: Tensor | None = None  # [B, Hq, n, D], of the last tokens

    def asked(self, query: Tensor, most: int) -> Beside:
        """With the queries [B, Hq, n, D] of new tokens, of which the last `most` are remembered."""
        if self.queries is None:
            return self
        return replace(self, queries=torch.cat([self.queries, query], 2)[:, :, -most:])

    def marked(self, known: int) -> Beside:
        """With marks for so many tokens: new ones have none."""
        if self.marks is None:
            return self
        return replace(self, marks=pad(self.marks, (0, known - self.marks.shape[2]), value=False))

    def looked_at(self, got: Tensor) -> Beside:
        """With more attention [B, H, n], of new tokens as well."""
        if self.sums is None:
            return self
        return replace(self, sums=pad(self.sums, (0, got.shape[2] - self.sums.shape[2])) + got)

    def of_prompt(self, end: int, most: int) -> Beside:
        """Once a prompt is read: of its queries, up to `end`, the last `most` are remembered."""
        if self.queries is None:
            return self
        return replace(self, queries=self.queries[:, :, max(0, end - most) : end])

    def left(self, stay: Tensor | None, known: int) -> Beside:
        """When the first `known` tokens have competed: those at places [B, H, n] compete again."""

        def own(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            rest = x[:, :, known:]
            return rest if stay is None else torch.cat([x[:, :, :known].gather(2, stay), rest], 2)

        return replace(self, sums=own(self.sums), marks=own(self.marks))

    def crop(self, window: int, count: int) -> Beside:
        """Without the last `count` tokens, of which the window holds `window`."""

        def own(x: Tensor | None, gone: int) -> Tensor | None:
            return None if x is None else x[:, :, : max(0, x.shape[2] - gone)].clone()

        gone = min(window, count)
        sums, marks = own(self.sums, gone), own(self.marks, gone)
        return replace(self, sums=sums, marks=marks, queries=own(self.queries, count))

    def select(self, rows: Tensor) -> Beside:
        """Of other batch rows."""
        found = {n: x if x is None else x.index_select(0, rows) for n, x in vars(self).items()}
        return Beside(**found)

    def owned(self) -> Beside:
        """Clones, which hold just their own bytes."""
        shape = torch.contiguous_format
        found = {n: x if x is None else x.clone(memory_format=shape) for n, x in vars(self).items()}
        return Beside(**found)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.untyped_storage().nbytes() for x in vars(self).values() if x is not None)
