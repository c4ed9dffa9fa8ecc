"""What a fit sees of one side of one layer, and the linear maps that stand before codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Fold(NamedTuple):
    """A linear map of each kv head, which kernels can take out of their loops.

    It stores y = (x - shift) @ turn, so x = y @ back + shift. Keys: q . x = (q @ back^T) . y and a
    constant, which softmax does not see. Values: out = out_y @ back + shift, since weights add up
    to one.
    """

    shift: Tensor  # [H, D]
    turn: Tensor  # [H, D, D]
    back: Tensor  # [H, D, D], the inverse of turn


@dataclass(frozen=True, eq=False)
class Seen:
    """What calibration saw of one side of one layer, as a codec's `fit` finds it: of what reaches
    that codec, so behind the maps of the linear codecs before it.

    KL is about the mean of e^T weight e over the errors e of tokens, up to one factor for the layer
    (second-order; ordered by query moments for keys, by likelihood's pull for values).
    """

    mean: Tensor  # [H, D] over tokens, float64
    covariance: Tensor  # [H, D, D]
    weight: Tensor  # [H, D, D]
    sample: Tensor  # [H, n, D], some tokens
    read: Tensor  # [H, D, D], second moment of what reads this side: queries, or attention's output
    readers: Tensor  # [H, m, D], some of those
    is_keys: bool = True

    def behind(self, fold: Fold) -> Seen:
        """The same as a codec after a linear one sees it."""
        turn, back = fold.turn.double(), fold.back.double()
        other = back.transpose(-1, -2) if self.is_keys else turn
        return Seen(
            torch.einsum("hd,hde->he", self.mean - fold.shift.double(), turn),
            turn.transpose(-1, -2) @ self.covariance @ turn,
            back @ self.weight @ back.transpose(-1, -2),
            (self.sample.double() - fold.shift.double()[:, None]) @ turn,
            other.transpose(-1, -2) @ self.read @ other,
            self.readers.double() @ other,
            self.is_keys,
        )


def joined(first: Fold, then: Fold) -> Fold:
    """One map in place of two."""
    first, then = (Fold(*(part.float() for part in own)) for own in (first, then))
    shift = first.shift + torch.einsum("hd,hde->he", then.shift, first.back)
    return Fold(shift, first.turn @ then.turn, then.back @ first.back)
