"""Lag: tokens win that spread widely on the scale of the tokens after them
(LagKV, arXiv:2504.04704)."""

from typing import Annotated

import torch
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.retention import Selector
from kvtune.view import View

MOST = 1e9  # of z: its square is still a number


class Lagkv(Selector):
    """Tokens are ranked within partitions of `lag`, each on the scale of the partition after it.

    z = (x - min) / (max - min) of each channel, with min and max of the next partition; then the
    deviation of z over the channels, a softmax over the partition, and the mean of that of keys
    and of values. The last whole partition has none after it: it and what follows it score above
    all others, later tokens higher; a layer that keeps fewer goes by recency alone. It looks at no
    query.
    """

    lag: Annotated[int, OneOf((64, 128, 256))] = 128

    def score(self, view: View) -> Tensor:
        """Ranks from 0 to 1 in each partition, then 1 to 2 by recency, [B, H, T]."""
        length = view.keys.shape[2]
        wide = torch.promote_types(view.keys.dtype, torch.float32)
        ranked = max(0, length // self.lag - 1) * self.lag
        tail = 1 + torch.arange(length - ranked, dtype=wide, device=view.keys.device) / length
        tail = tail.expand(*view.keys.shape[:2], -1)
        if not ranked:
            return tail
        spread = self._spread(view.keys.to(wide)) + self._spread(view.values.to(wide))
        # of equal ones the later is higher
        ranks = spread.argsort(dim=-1, stable=True).argsort(-1).to(wide) / self.lag
        return torch.cat([ranks.flatten(2), tail], 2)

    def _spread(self, x: Tensor) -> Tensor:
        """Softmax of deviations [B, H, P - 1, lag] of x [B, H, T, D] in P whole partitions."""
        count = x.shape[2] // self.lag
        parts = x[:, :, : count * self.lag].unflatten(2, (count, self.lag))
        after = parts[:, :, 1:]
        low, high = after.amin(3, keepdim=True), after.amax(3, keepdim=True)
        # a channel that does not vary has no scale, and tells nothing
        scaled: Tensor = ((parts[:, :, :-1] - low) / (high - low)).masked_fill(high == low, 0)
        return scaled.clamp(-MOST, MOST).std(-1).softmax(-1)
