"""Merges every token into the winner that is most like it (LOOK-M, arXiv:2406.18139)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvtune.retention import Merged, Merger
from kvtune.routing import Routes, counted, routed, summed, turned, unturned
from kvtune.view import View


class LookM(Merger):
    """All tokens that lost go to the winner whose key has the largest cosine with their own.

    Of the m that go to one winner, its vector x (a value, or a key) becomes

    - `averaged`: (x + sum x_e) / (m + 1);
    - `pivotal`: (x + sum (x_e + x) / 2) / (m + 1), which stays nearer to the winner;
    - `weighted`: (x + sum cos_e x_e) / (m + 1), whose weights sum to less than one.

    The paper's best is pivotal, with a selector that puts text before images. Its code drops, in
    the other two, what is less like its winner than the mean; here all are merged.

    `keys = "merged"` is EXPERIMENTAL: keys are averaged as well, before their rotary embedding,
    and turned to the winner's position. The paper averages them as they are cached, where those of
    distant positions cancel out.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rope", "positions"})  # where keys are merged
    rule: Literal["averaged", "pivotal", "weighted"] = "pivotal"
    keys: Literal["left", "merged"] = "left"

    @property
    def wants(self) -> frozenset[str]:
        """Nothing where keys are left."""
        return self.needs if self.keys == "merged" else frozenset()

    def merge(self, won: View, lost: View) -> Merged:
        """The winners [B, H, T, D] with others in them."""
        if 0 in (won.keys.shape[2], lost.keys.shape[2]):
            return Merged(won.keys, won.values)
        routes = routed(won.keys, lost.keys)
        everyone = torch.ones_like(routes.target, dtype=torch.bool)
        count = counted(routes.target, everyone, won.keys.shape[2])[..., None]
        keys, values = won.keys, self._mixed(won.values, lost.values, routes, count)
        if self.keys == "merged":
            mixed = turned(won, self._mixed(unturned(won), unturned(lost), routes, count))
            keys = torch.where(count > 0, mixed.to(keys.dtype), keys)  # a turn and back rounds
        return Merged(keys, values.to(won.values.dtype))

    def _mixed(self, own: Tensor, lost: Tensor, routes: Routes, count: Tensor) -> Tensor:
        """Winners [B, H, W, D] to which `count` [B, H, W, 1] of others are added."""
        weight = routes.cosine
        if self.rule != "weighted":
            weight = torch.full_like(weight, 0.5 if self.rule == "pivotal" else 1.0)
        sums, _ = summed(lost, weight, routes.target, own.shape[2])
        still = 1 + count / 2 if self.rule == "pivotal" else 1
        return (own.to(sums) * still + sums) / (count + 1)
