"""Second moments, samples and attention statistics of a model's cache, as the bank is built."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from kvtune import turning
from kvtune.bank import Bank
from kvtune.rope import Rope
from kvtune.spectral import gram

JOINT = 1024  # channels of all kv heads: the moments of more are not kept
SAMPLED = 16  # tokens of each context that are kept as they are
SIDES = ("keys", "values", "queries")


class Moments:
    """Sums of x and of x x^T per layer and kv head, in float64, and some x as they are:
    of pre-RoPE keys and queries, and of values.

    Query heads are summed over the kv head that they share. Without a rope (None) keys and queries
    are taken as they are cached.
    """

    def __init__(self, ropes: dict[int, Rope]) -> None:
        self._ropes = ropes
        self._sums: dict[tuple[str, int], list[Tensor]] = {}
        self._counts: dict[tuple[str, int], int] = defaultdict(int)
        self._joint: dict[tuple[str, int], Tensor] = {}
        self._samples: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Adds one context: query [B, Hq, T, D], keys and values
        [B, H, T, D] from position 0 on."""
        positions = torch.arange(keys.shape[2], device=keys.device)
        if rope := self._ropes.get(layer):
            query, keys = rope.unturn(query, positions), rope.unturn(keys, positions)
        grouped = query.unflatten(1, (keys.shape[1], -1))
        picked = _picked(keys.shape[2])
        some = torch.stack(
            [grouped[:, :, i % grouped.shape[2], t] for i, t in enumerate(picked)], 2
        )
        self._samples["queries", layer].append(some)
        self._samples["keys", layer].append(keys[:, :, picked])
        self._samples["values", layer].append(values[:, :, picked])
        for side, x in (("keys", keys), ("values", values), ("queries", grouped.flatten(2, 3))):
            self._add((side, layer), x.double())
        if keys.shape[1] * keys.shape[3] <= JOINT:
            self._add_joint(("keys", layer), keys)
            self._add_joint(("values", layer), values)

    def _add(self, place: tuple[str, int], x: Tensor) -> None:
        first, second = x.sum((0, 2)), torch.einsum("bhtd,bhte->hde", x, x)
        self._counts[place] += x.shape[0] * x.shape[2]
        held = self._sums.setdefault(place, [torch.zeros_like(first), torch.zeros_like(second)])
        held[0] += first
        held[1] += second

    def _add_joint(self, place: tuple[str, int], x: Tensor) -> None:
        together = gram(x.transpose(1, 2).flatten(2).double()).sum(0)
        self._joint[place] = self._joint[place] + together if place in self._joint else together

    def tensors(self, context: int) -> dict[str, Tensor]:
        """What was seen, layers in ascending order, for caches of up to `context` tokens.

        `moments.SIDE` [L, H, D, D], `means.SIDE` [L, H, D] and `samples.SIDE` [L, H, n, D] are
        pre-RoPE. `cached.*` are the same of keys and queries as they are cached and asked, over all
        positions of a context, and `facing.queries` is the moment of queries as pre-RoPE keys see
        them: turned back by the position of the key. `joint.SIDE` [L, H * D, H * D] are moments of
        all kv heads at once, where they have up to 1,024 channels, and `cached.spectra.keys`
        [L, H * D] the eigenvalues of those of keys as they are cached, the largest first.
        """
        layers = sorted({layer for _, layer in self._sums})
        found: dict[str, list[Tensor]] = defaultdict(list)
        for layer in layers:
            for name, x in self._of(layer, context).items():
                found[name].append(x.cpu())  # layers may live on different devices
        return {
            name: torch.stack(rows).half() if "samples" in name else torch.stack(rows).float()
            for name, rows in found.items()
        }

    def _of(self, layer: int, context: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for side in SIDES:
            first, second = self._sums[side, layer]
            count = self._counts[side, layer]
            found |= {f"means.{side}": first / count, f"moments.{side}": second / count}
            found[f"samples.{side}"] = _joined(self._samples[side, layer])
            if (side, layer) in self._joint:
                found[f"joint.{side}"] = self._joint[side, layer] / count
        if rope := self._ropes.get(layer):
            found |= _cached(found, rope, context)
        if rope and "joint.keys" in found:
            heads = found["means.keys"].shape[0]
            turned = turning.together(rope, found["joint.keys"], heads, context)
            found["cached.spectra.keys"] = torch.linalg.eigvalsh(turned).flip(-1).clamp_min(0)
        return found


def _cached(found: Mapping[str, Tensor], rope: Rope, context: int) -> dict[str, Tensor]:
    queries = turning.moment(rope, found["moments.queries"], context)
    return {
        "cached.means.keys": turning.mean(rope, found["means.keys"], context),
        "cached.moments.keys": turning.moment(rope, found["moments.keys"], context),
        "cached.moments.queries": queries,
        "cached.samples.keys": turning.sample(rope, found["samples.keys"], context),
        "cached.samples.queries": turning.sample(rope, found["samples.queries"], context),
        "facing.queries": turning.moment(rope, queries, context, inverse=True),
    }


def pulled(
    pulls: Mapping[int, tuple[Tensor, Tensor]], kv_heads: Mapping[int, int]
) -> dict[str, Tensor]:
    """Second moments [L, H, D, D] of attention outputs and of likelihood's pull at them, and some
    outputs [L, H, n, D], from both [N, Hq, M, D] of each layer; query heads as in `Moments`."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for layer in sorted(pulls):
        for name, x in zip(("outputs", "pulls"), pulls[layer], strict=True):
            grouped = x.double().unflatten(1, (kv_heads[layer], -1)).transpose(0, 1).flatten(1, 3)
            moment = grouped.transpose(1, 2) @ grouped / grouped.shape[1]
            found[f"moments.{name}"].append(moment.cpu())
            if name == "outputs":
                step = -(-grouped.shape[1] // (8 * SAMPLED))
                found["samples.outputs"].append(grouped[:, ::step].cpu())
    return {
        name: torch.stack(rows).half() if "samples" in name else torch.stack(rows).float()
        for name, rows in found.items()
    }


def _picked(length: int) -> list[int]:
    """Where a context is sampled: evenly, its first tokens left out where it is long enough."""
    count = min(SAMPLED, length)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows).transpose(0, 1).flatten(1, 2)  # [H, N * n, D]


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
