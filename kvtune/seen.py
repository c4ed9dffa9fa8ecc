"""What a fit sees of one side of one layer, and the linear maps that stand before codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvtune.errors import IntegrityError


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
    together: Tensor | None = None  # [H * D, H * D], the covariance of all heads at once

    def grouped(self, size: int) -> Seen:
        """The same of neighbouring heads as one, `size` of them: [H / size, size * D].

        What reads a head reads no other, so weights and readers are blocks.

        Raises:
            IntegrityError: the profile lacks what heads have in common.
        """
        heads, dim = self.mean.shape
        if size == 1:
            return self
        if self.together is None:
            raise IntegrityError(
                "The profile lacks the moments of heads together, which a basis of several heads "
                "is found in: of keys they are known before RoPE only, and up to 1,024 channels.",
                "Put derope before it, write heads = 1, or run: kvtune calibrate MODEL",
            )
        groups, width = heads // size, size * dim
        squares = self.together.unflatten(0, (groups, width)).unflatten(2, (groups, width))
        own = torch.diagonal(squares, dim1=0, dim2=2).permute(2, 0, 1)
        return Seen(
            self.mean.reshape(groups, width),
            own,
            blocks(self.weight, size),
            self.sample.unflatten(0, (groups, size)).transpose(1, 2).flatten(2),
            blocks(self.read, size),
            blocks(self.readers, size),
            self.is_keys,
            self.together,
        )

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
            None if self.together is None else _turned(self.together, turn),
        )


def blocks(own: Tensor, size: int) -> Tensor:
    """[H, m, D] as [H / size, size * m, size * D]: each head's rows in its own channels, which of
    matrices [H, D, D] makes blocks."""
    groups = own.unflatten(0, (-1, size))
    return torch.stack([torch.block_diag(*group) for group in groups])


def _turned(together: Tensor, turn: Tensor) -> Tensor:
    whole = torch.block_diag(*turn)
    turned: Tensor = whole.T @ together @ whole
    return turned


def joined(first: Fold, then: Fold) -> Fold:
    """One map in place of two."""
    first, then = (Fold(*(part.float() for part in own)) for own in (first, then))
    shift = first.shift + torch.einsum("hd,hde->he", then.shift, first.back)
    return Fold(shift, first.turn @ then.turn, then.back @ first.back)
