"""Merges the directions of two layers, token by token (MiniCache, arXiv:2405.14366)."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.parts import Code, Sharer, Site

PARALLEL = 1e-3  # a sine below which the arc between two directions is a straight line


class Minicache(Sharer):
    """Both layers keep the lengths of their vectors, and share a direction on the arc between them.

    e = sin((1 - t) w) / sin w * u1 + sin(t w) / sin w * u2, where w is the angle between the unit
    vectors u1 and u2; where they are near parallel, a straight line made a unit again. The
    `retained` part of the tokens with the largest angles, head by head, is kept exactly in both
    layers. `retain = "similar"` keeps the smallest angles instead, so merges the very tokens that
    merging harms: it is how the inequality of the paper has been read, and is here to be compared.

    The same turn is applied to both layers at a position, so keys merge behind their rotary
    embedding as they would before it.
    """

    layers: Literal[2] = 2
    t: Annotated[float, OneOf(tuple(n / 10 for n in range(11)))] = 0.6
    retained: Annotated[float, OneOf((0.0, 0.02, 0.05, 0.1, 0.2))] = 0.05
    retain: Literal["dissimilar", "similar"] = "dissimilar"

    def shape(self, side: str, layers: int, heads: int, head_dim: int) -> tuple[int, int]:
        """One direction for each head."""
        return heads, head_dim

    def part(self, side: str) -> float:
        """One direction for both layers."""
        return 1 / self.layers

    def fold(self, layers: tuple[Tensor, ...], sites: tuple[Site, ...]) -> Code:
        """Directions [B, H, T, D]; a length [B, H, T, 1] for each layer; the true positions of
        retained tokens, int32 [B, H, R], and these [B, H, R, D] of each layer."""
        dtype = layers[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        lengths = [x.to(wide).norm(dim=-1, keepdim=True) for x in layers]
        units = [
            x.to(wide) / length.clamp_min(torch.finfo(wide).tiny)
            for x, length in zip(layers, lengths, strict=True)
        ]
        one, two = units[0], units[-1]  # a layer left over is merged with itself
        cosine = (one * two).sum(-1, keepdim=True).clamp(-1, 1)
        merged = slerp(one, two, cosine, self.t)
        count = round(self.retained * layers[0].shape[2]) if len(layers) > 1 else 0
        places = (-cosine if self.retain == "dissimilar" else cosine)[..., 0].topk(count).indices
        places = places.sort(-1).values
        exact = [x.gather(2, places[..., None].expand(-1, -1, -1, x.shape[-1])) for x in layers[:2]]
        positions = sites[0].positions.to(places.device)[places].int()
        sides = (*(length.to(dtype) for length in lengths), positions, *exact)
        return Code(merged.to(dtype), sides)

    def unfold(self, code: Code, index: int, site: Site) -> Tensor:
        """The common direction at the layer's own length; retained tokens as they were."""
        count = (len(code.side) - 1) // 2
        x = (code.body.to(site.dtype) * code.side[index]).to(site.dtype)
        places = (code.side[count].long() - site.positions[0])[..., None]
        exact = code.side[count + 1 + index].to(site.dtype)
        return x.scatter(2, places.expand_as(exact), exact)


def slerp(one: Tensor, two: Tensor, cosine: Tensor, t: float) -> Tensor:
    """The unit vector at t on the arc from `one` to `two`, unit vectors [*, D] of a cosine [*, 1].

    Opposite ones span no arc; the straight line between them ends at the nearer.
    """
    angle = cosine.acos()
    sine = angle.sin()
    arc = (((1 - t) * angle).sin() * one + (t * angle).sin() * two) / sine.clamp_min(PARALLEL)
    line = (1 - t) * one + t * two
    line = line / line.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(line.dtype).tiny)
    return torch.where(sine < PARALLEL, line, arc)
