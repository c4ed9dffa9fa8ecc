"""Recency: the last tokens win (StreamingLLM, arXiv:2309.17453)."""

from typing import Literal

import torch
from torch import Tensor

from kvtune.retention import Selector
from kvtune.view import View


class Streaming(Selector):
    """score = place of a token: the later wins.

    The attention sinks of the paper are the policy's own `sinks`. Keys keep the phases of their
    true positions ("text"), or are turned by their places in the cache, as in the paper.
    """

    positions: Literal["text", "cache"] = "text"

    @property
    def in_cache(self) -> bool:
        """Where `positions` are those of the cache."""
        return self.positions == "cache"

    def score(self, view: View) -> Tensor:
        """0, 1 ... T - 1 in each head, [B, H, T]; exact up to 16 million tokens."""
        length = view.keys.shape[2]
        wide = torch.promote_types(view.keys.dtype, torch.float32)
        places = torch.arange(length, dtype=wide, device=view.keys.device)
        return places.expand(view.keys.shape[:3])
