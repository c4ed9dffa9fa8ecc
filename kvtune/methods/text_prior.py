"""Text first: accumulated attention, but text wins over images (LOOK-M, arXiv:2406.18139)."""

from typing import ClassVar

import torch
from torch import Tensor

from kvtune.retention import Choice, Selector
from kvtune.splits import parted
from kvtune.view import View


class TextPrior(Selector):
    """score = attention mass of text; what is no text stands below it, in the same order.

    Where nobody says what is text, all tokens compete by attention alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "kinds"})

    def score(self, view: View) -> Tensor:
        """Attention a of text, and -1 / a of other tokens, [B, H, T].

        An offset would swallow small differences, or leave the range of 16 bits, as the paper's
        own does; the reciprocal keeps both the order and the range.
        """
        assert view.attention is not None, "the layer gives what a part needs"
        if view.kinds is None:
            return view.attention
        least = torch.finfo(torch.float32).tiny
        return torch.where(view.kinds, view.attention, -1 / view.attention.clamp(min=least))

    def choose(self, view: View, count: int) -> Choice:
        """As others choose; heads that are `alike` go by the mean of their attention."""
        if self.alike and view.attention is not None:
            mean = view.attention.mean(1, keepdim=True).expand_as(view.attention)
            view = view._replace(attention=mean)
        return Choice(parted(self.score(view), count)[0])
