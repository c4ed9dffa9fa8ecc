"""Keeps few channels of all kv heads by fitted maps down and up (CSKV, arXiv:2409.10593)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from kvtune import spectral
from kvtune.marks import OneOf
from kvtune.parts import Code, Fold, Projection, Seen, Site

STEP = 8  # channels are kept in multiples of it, so that codes behind fill whole bytes


class Cskv(Projection):
    """Stores y = (x - bias) @ down of all kv heads at once and reads y @ up + bias.

    `shrink` is the share of channels left out. Keys want `derope` before it. The bias, a mean, is
    added behind the map up: a large bias of a key projection (Qwen2) costs no channel.

    The paper factors projection weights W ~ A B and stores h A of a hidden state h. Here down acts
    on the cached x = h W, which loses nothing: of all A, those of the least squared error are
    W @ down. An engine may fold W @ down into the projection, and store y with no second product.

    `fit` finds the closed form that a profile allows: the maps of the least error where errors
    weigh as strongly as they are read, which no start from the weights alone (the paper's SVD or
    ASVD) comes near. `kvtune fit --model` then trains the maps on the error of the layer's
    attention output, through the codes of the quantiser that follows, if one does.
    """

    shrink: Annotated[float, OneOf((0.0, 0.25, 0.5, 0.625, 0.75, 0.8, 0.875))] = 0.5

    fits = True
    trains = ("down", "up")

    @property
    def payload_bits(self) -> float:
        """Of a cached value: as many as channels are kept."""
        return 16 * (1 - self.shrink)

    @property
    def apart(self) -> bool:
        """All heads of a layer are one."""
        return False

    def shape(self, heads: int, head_dim: int) -> tuple[int, int]:
        """One head of the channels that are kept: a multiple of 8, unless all of them are."""
        width = heads * head_dim
        rank = STEP * round((1 - self.shrink) * width / STEP)
        return 1, (min(width, max(STEP, rank)) if self.shrink else width)

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """Maps down [H, D, r] and up [H, r, D], and the bias [H, D], in 16 bits."""
        rank = self.shape(heads, head_dim)[1]
        half = torch.empty(heads, head_dim, dtype=torch.float16, device="meta")
        maps = half.new_empty(heads, head_dim, rank), half.new_empty(heads, rank, head_dim)
        return {"down": maps[0], "up": maps[1], "bias": half}

    def fit(self, seen: Seen) -> dict[str, Tensor]:
        """The maps whose errors, weighted by how they are read, are least (Eckart and Young)."""
        heads, dim = seen.mean.shape
        width, rank = heads * dim, self.shape(heads, dim)[1]
        # attention rests on tokens whose values are next to nothing, and these must stay so: the
        # mean of values as attention weighs them, not of all tokens alike
        bias = (seen.mean if seen.is_keys else seen.readers.mean(1)).half()
        if rank == width:
            eye = torch.eye(width).half()
            return {**_maps(eye, eye, dim), "bias": bias}
        joint = seen.grouped(heads)
        root = spectral.root(joint.weight)[0]
        root = root / torch.linalg.matrix_norm(root, 2)
        off = joint.mean - bias.double().flatten()
        basis = spectral.top(root @ (joint.covariance[0] + off.T @ off) @ root, rank)
        up = torch.linalg.solve(root, basis).T
        return {**_maps((root @ basis).half(), up.half(), dim), "bias": bias}

    def behind(self, seen: Seen, site: Site) -> Seen:
        """What was seen of the channels that are kept."""
        down, up, bias = (
            site.tensors[f"{self.name()}.{name}"].double() for name in ("down", "up", "bias")
        )
        fold = Fold(
            bias.reshape(1, -1), down.flatten(0, 1)[None], up.transpose(0, 1).flatten(1)[None]
        )
        return seen.grouped(len(bias)).behind(fold)

    def encode(self, x: Tensor, site: Site) -> Code:
        """The channels [B, 1, T, r] that are kept, in the dtype of x but at least in 32 bits."""
        down, bias = (site.tensors[f"{self.name()}.{name}"].double() for name in ("down", "bias"))
        # in 64 bits: how many tokens are projected at once moves no code
        y = torch.einsum("bhtd,hdr->btr", x.double() - bias[:, None], down)
        return Code(y[:, None].to(torch.promote_types(x.dtype, torch.float32)))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns x [B, H, T, D]."""
        up, bias = (site.tensors[f"{self.name()}.{name}"].float() for name in ("up", "bias"))
        return (code.body.float() @ up + bias[:, None]).to(site.dtype)


def _maps(down: Tensor, up: Tensor, head_dim: int) -> dict[str, Tensor]:
    """The maps [w, r] and [r, w] of all channels, by head."""
    by_head = up.unflatten(1, (-1, head_dim)).transpose(0, 1)
    return {"down": down.unflatten(0, (-1, head_dim)).contiguous(), "up": by_head.contiguous()}
