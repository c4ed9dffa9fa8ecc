"""Merges what is like a winner, past a threshold that follows it (D2O, arXiv:2406.13035)."""

from typing import Annotated, ClassVar, Literal

import torch

from kvtune.marks import OneOf
from kvtune.retention import Merged, Merger
from kvtune.routing import blended, counted, routed, turned, unturned
from kvtune.view import View

SLACK = 1e-5  # cosines of equal keys do not come out quite equal
TENTHS = tuple(n / 10 for n in range(11))


class D2o(Merger):
    """Tokens that lost merge with the winner that is most like them, or are dropped.

    u = the largest cosine of a key with any winner's. A token is merged where u >= tau, head by
    head. tau is the mean of u at first, and then `alpha` tau + `beta` mean(u): a running mean
    where the two sum to one.

    A winner's weight is e and another's exp(u), of which each gets its share: they sum to one, so
    that vectors keep their length. The paper's constants are so read; its code divides by a count
    instead, which shrinks them, and decides for all heads at once.

    `keys = "merged"` is EXPERIMENTAL: keys are averaged as well, before their rotary embedding,
    and turned to the winner's position. The paper averages them as they are cached, where those of
    distant positions cancel out.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rope", "positions"})  # where keys are merged
    alpha: Annotated[float, OneOf(TENTHS)] = 0.5
    beta: Annotated[float, OneOf(TENTHS)] = 0.5
    keys: Literal["left", "merged"] = "left"

    @property
    def wants(self) -> frozenset[str]:
        """Nothing where keys are left."""
        return self.needs if self.keys == "merged" else frozenset()

    def merge(self, won: View, lost: View) -> Merged:
        """The winners [B, H, T, D] with others in them; memory is tau [B, H]."""
        if 0 in (won.keys.shape[2], lost.keys.shape[2]):
            return Merged(won.keys, won.values, won.memory)
        target, cosine = routed(won.keys, lost.keys)
        tau = cosine.mean(-1)
        if won.memory is not None:
            tau = self.alpha * won.memory.to(tau) + self.beta * tau
        merged = cosine >= tau[..., None] - SLACK
        weight = (cosine - 1).exp() * merged  # over e: a winner's own is one
        keys, values = won.keys, blended(won.values, lost.values, weight, target)
        if self.keys == "merged":
            mixed = turned(won, blended(unturned(won), unturned(lost), weight, target))
            bent = counted(target, merged, keys.shape[2])[..., None] > 0
            keys = torch.where(bent, mixed.to(keys.dtype), keys)  # a turn there and back rounds
        return Merged(keys, values.to(won.values.dtype), tau)
