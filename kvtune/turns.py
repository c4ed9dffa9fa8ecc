"""Turn: a codec that is one linear map of each kv head, which kernels fold into queries."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from kvtune.parts import Code, Codec, Fold, Site


class Turn(Codec):
    """Stores (x - shift) @ turn, and keeps nothing of its own but fitted tensors, in 16 bits.

    Codes are made of what float64 gives: how many tokens are turned at once moves no code.
    """

    linear = True
    fits = True

    @abstractmethod
    def made(self, tensors: dict[str, Tensor]) -> Fold:
        """The map of the fitted tensors by their names: views of them, where they are matrices."""

    def fold(self, site: Site, heads: int, head_dim: int) -> Fold:
        """The map."""
        stem = f"{self.name()}."
        return self.made(
            {k.removeprefix(stem): x for k, x in site.tensors.items() if k.startswith(stem)}
        )

    def encode(self, x: Tensor, site: Site) -> Code:
        """Returns the turned x [B, H, T, D], in the dtype of x but at least in 32 bits."""
        shift, turn, _ = self.fold(site, x.shape[1], x.shape[-1])
        y = torch.einsum("bhtd,hde->bhte", x.double() - shift.double()[:, None], turn.double())
        return Code(y.to(torch.promote_types(x.dtype, torch.float32)))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns x [B, H, T, D], turned back."""
        y = code.body.float()
        shift, _, back = self.fold(site, y.shape[1], y.shape[-1])
        return (y @ back.float() + shift.float()[:, None]).to(site.dtype)
