"""Expected attention: tokens win that queries to come would look at, by what queries were so far
(arXiv:2510.00636)."""

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.retention import ALL, Selector
from kvtune.rope import Rope
from kvtune.view import View

OUTLIERS = 4  # first tokens of a text, whose queries are unlike all others


class Expected(Selector):
    """score = (softmax(z) + epsilon) * ||v||_2, softmax as the mean over the query heads.

    z is the logarithm of E[exp(scale * q k)] for normal queries q: scale * k m + scale^2 / 2 *
    k C k, with the mean m and covariance C of the queries before RoPE, turned by the mean rotation
    of the next `future` positions. A soft cap of logits is left out: it has no such closed form.
    """

    future: Annotated[int, OneOf((128, 512, 2048))] = 512
    epsilon: Annotated[float, OneOf((0.0, 1e-4, 1e-2, 2e-2))] = 0.0
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "rope", "positions"})

    @property
    def observed(self) -> int:
        """All queries of the prompt."""
        return ALL

    def score(self, view: View) -> Tensor:
        """Expected attention by the length of values, [B, H, T]."""
        mean, spread = self._queries_to_come(view)
        wide, heads = mean.dtype, view.keys.shape[1]
        held = view.keys if view.last is None else torch.cat([view.keys, view.last], 2)
        keys, scale = held.to(wide), view.spot.scale or held.shape[-1] ** -0.5
        mean, spread = mean.unflatten(1, (heads, -1)), spread.unflatten(1, (heads, -1))
        share: int = mean.shape[2]
        total: Tensor = torch.zeros_like(keys[..., 0])
        for head in range(share):  # one at a time: of all together, k C is larger than the cache
            logits = (keys @ mean[:, :, head, :, None]).squeeze(-1) * scale
            logits += ((keys @ spread[:, :, head]) * keys).sum(-1) * (scale**2 / 2)
            total += logits.softmax(-1)
        length: Tensor = torch.linalg.vector_norm(view.values, dim=-1, dtype=wide)
        return length * (total[:, :, : view.keys.shape[2]] / share + self.epsilon)

    def _queries_to_come(self, view: View) -> tuple[Tensor, Tensor]:
        """Mean [B, Hq, D] and covariance [B, Hq, D, D] of them, as they stand after RoPE."""
        rope, queries = view.spot.rope, view.queries
        assert rope is not None and queries is not None, "the layer gives what a part needs"
        start = view.seen - queries.shape[2]
        skip = min(max(0, OUTLIERS - start), queries.shape[2] - 1)
        wide = queries[:, :, skip:].to(torch.promote_types(queries.dtype, torch.float32))
        device = queries.device
        plain = rope.unturn(wide, torch.arange(start + skip, view.seen, device=device))
        mean = plain.mean(2, keepdim=True)
        centred = plain - mean
        covariance = centred.transpose(2, 3) @ centred / plain.shape[2]
        ahead = torch.arange(view.seen, view.seen + self.future, device=device)
        turn = mean_turn(rope, ahead, queries.shape[-1]).to(wide)
        return (mean @ turn.T).squeeze(2), turn @ covariance @ turn.T


def mean_turn(rope: Rope, positions: Tensor, dim: int) -> Tensor:
    """The mean [D, D] of the rotations of so many channels at positions [n]: y = R x."""
    cos, sin = (x.mean(0) for x in rope.tables(positions))
    half = cos.shape[0]
    order = torch.arange(2 * half, device=cos.device)
    one, two = (order[::2], order[1::2]) if rope.interleaved else order.chunk(2)
    turn = torch.eye(dim, dtype=cos.dtype, device=cos.device)  # the last channels may not turn
    turn[one, one], turn[two, two] = cos, cos
    turn[one, two], turn[two, one] = -sin, sin
    return turn
