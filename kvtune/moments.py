"""Second moments and attention statistics of a model's cache, summed while the bank is built."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from kvtune.bank import Bank
from kvtune.rope import Rope


class Moments:
    """Sums of x and of x x^T per layer and kv head, in float64:
    of pre-RoPE keys and queries, and of values.

    Query heads are summed over the kv head that they share. Without a rope (None) keys and queries
    are taken as they are cached.
    """

    def __init__(self, ropes: dict[int, Rope]) -> None:
        self._ropes = ropes
        self._sums: dict[tuple[str, int], list[Tensor]] = {}
        self._counts: dict[tuple[str, int], int] = defaultdict(int)

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Adds one context: query [B, Hq, T, D], keys and values
        [B, H, T, D] from position 0 on."""
        positions = torch.arange(keys.shape[2], device=keys.device)
        if rope := self._ropes.get(layer):
            query, keys = rope.unturn(query, positions), rope.unturn(keys, positions)
        grouped = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
        for side, x in (("keys", keys), ("values", values), ("queries", grouped)):
            self._add((side, layer), x.double())

    def _add(self, place: tuple[str, int], x: Tensor) -> None:
        first, second = x.sum((0, 2)), torch.einsum("bhtd,bhte->hde", x, x)
        self._counts[place] += x.shape[0] * x.shape[2]
        held = self._sums.setdefault(place, [torch.zeros_like(first), torch.zeros_like(second)])
        held[0] += first
        held[1] += second

    def tensors(self) -> dict[str, Tensor]:
        """`moments.SIDE` [L, H, D, D] and `means.SIDE` [L, H, D] in
        fp32, layers in ascending order."""
        found: dict[str, Tensor] = {}
        for side in ("keys", "values", "queries"):
            places = sorted(place for place in self._sums if place[0] == side)
            for name, index in (("means", 0), ("moments", 1)):
                # on the CPU: layers may live on different devices
                rows = [(self._sums[own][index] / self._counts[own]).cpu() for own in places]
                found[f"{name}.{side}"] = torch.stack(rows).float()
        return found


@torch.no_grad()
def attention_mass(bank: Bank, sinks: int = 4, recent: int = 64) -> dict[str, Tensor]:
    """Where the last queries of each context look, per layer and query head [L, Hq].

    `mass.sinks` and `mass.recent` are the shares of attention on the first and last tokens,
    `mass.entropy` is in nats, `mass.coverage90` is the share of tokens that hold 90 % of the
    attention.
    """
    rows = []
    for layer in bank.facts.compressible():
        attention = probabilities(bank.queries[layer], bank.keys[layer])
        ordered = attention.sort(-1, descending=True).values.cumsum(-1)
        rows.append(
            (
                attention[..., :sinks].sum(-1),
                attention[..., -recent:].sum(-1),
                torch.special.entr(attention).sum(-1),
                (ordered < 0.9).float().mean(-1),
            )
        )
    names = ("mass.sinks", "mass.recent", "mass.entropy", "mass.coverage90")
    return {
        name: torch.stack([stat.mean((0, 2)).cpu() for stat in column])
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def probabilities(query: Tensor, keys: Tensor) -> Tensor:
    """Attention [N, Hq, W, T] of the last W queries [N, Hq, W,
    D] of a context on its keys [N, H, T, D]."""
    count, length = query.shape[2], keys.shape[2]
    grouped = query.unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("nhgwd,nhtd->nhgwt", grouped, keys).float() * query.shape[-1] ** -0.5
    hidden = torch.ones(count, length, dtype=torch.bool, device=keys.device).triu(
        length - count + 1
    )
    attention: Tensor = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    return attention.flatten(1, 2)
