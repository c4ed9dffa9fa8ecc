"""Merges values by likeness of keys and length of values; keys are left (kvpress' MergingPress)."""

from typing import Annotated

from kvtune.marks import OneOf
from kvtune.retention import Merged, Merger
from kvtune.routing import blended, routed
from kvtune.view import View


class ValuesOnly(Merger):
    """Values that lost are folded into that of the winner whose key is most like theirs.

    The weight of a value v for a winner's v_t is w = max(cos, 0) |v| / (|v| + |v_t|), where cos is
    that of the keys, and a winner becomes (v_t + sum w v) / (1 + sum w). So a short value bends a
    long one little, and a winner stays within the hull of what it was made of. Below `threshold`,
    a cosine, a token is dropped. Keys are not touched: what a query finds stays what it was.
    Source: the merging press of kvpress (NVIDIA).
    """

    threshold: Annotated[float, OneOf(tuple(n / 10 for n in range(10)))] = 0.0

    def merge(self, won: View, lost: View) -> Merged:
        """The winners' keys as they are, and values [B, H, T, D] with others in them."""
        if 0 in (won.keys.shape[2], lost.keys.shape[2]):
            return Merged(won.keys, won.values)
        target, cosine = routed(won.keys, lost.keys)
        weight = cosine.clamp_min(0) * (cosine >= self.threshold)
        own, other = (x.values.to(cosine.dtype).norm(dim=-1) for x in (won, lost))
        both = other + own.gather(2, target)
        # where both are zero the weight is too, and nothing is added
        weight = weight * other / both.clamp_min(1e-30)
        values = blended(won.values, lost.values, weight, target)
        return Merged(won.keys, values.to(won.values.dtype))
