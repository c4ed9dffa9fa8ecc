"""Channels that matter get double bits, in pages of one layout
(MixKVQ; Kitty, arXiv:2511.18643)."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.parts import Seen
from kvtune.planes import DIGITS, PlaneQuantizer


class Promote(PlaneQuantizer):
    """Two bits a channel, four for a share of them, kept as a second plane of two bits.

    `by = "reads"` promotes by mean magnitude of queries times the range of keys (MixKVQ), `by =
    "magnitude"` by mean magnitude of the channel itself (Kitty). The published systems choose
    anew for each page; here the choice is fitted once, so that it costs a byte a channel.
    """

    share: Annotated[float, OneOf((0.125, 0.25, 0.5))] = 0.25
    by: Literal["reads", "magnitude"] = "reads"
    group: Annotated[int, OneOf((32, 64, 128))] = 128

    @property
    def payload_bits(self) -> float:
        """The mean code bits."""
        return DIGITS * (1 + self.share)

    @property
    def tokens(self) -> int:
        """The group."""
        return self.group

    def planes_of(self, head_dim: int) -> int:
        """One for each channel, and one for each promoted channel."""
        return head_dim + int(self.share * head_dim)

    def counts(self, seen: Seen) -> Tensor:
        """Two planes where it matters most, one elsewhere."""
        score = seen.sample.abs().mean(1)
        if self.by == "reads":
            low, high = seen.sample.aminmax(dim=1)
            score = seen.readers.abs().mean(1) * (high - low)
        most = self.planes_of(score.shape[1]) - score.shape[1]
        found = torch.ones(score.shape, dtype=torch.int64)
        return found.scatter(1, score.topk(most, 1).indices, 2)
