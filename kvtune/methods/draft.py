"""Draft: tokens win that the answer looks at which a small model has drafted (SpecKV)."""

from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.pooling import pooled
from kvtune.retention import Selector
from kvtune.view import View, looked


class Draft(Selector):
    """score = the most attention of the last `window` queries of a prompt and of those of a draft.

    SpecKV (arXiv:2506.08373): the tokens of a draft are read behind the prompt, looked at, and not
    stored. `reduce` is over these queries and the query heads of a kv head at once; tokens near to
    one that is looked at win with it (max-pool over `kernel`).
    """

    window: Annotated[int, OneOf((8, 16, 32, 64))] = 32
    reduce: Literal["max", "mean"] = "max"
    kernel: Annotated[int, OneOf((1, 3, 5, 7))] = 7
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "ahead"})

    @property
    def observed(self) -> int:
        """The window, without the draft."""
        return self.window

    def score(self, view: View) -> Tensor:
        """What is looked at most, [B, H, T]; head by head, since rows are many."""
        assert view.queries is not None, "the layer gives what a part needs"
        groups = view.queries.shape[1] // view.keys.shape[1]
        found = []
        for head in range(view.keys.shape[1]):
            rows = looked(_alone(view, head, groups), self.window + view.ahead).flatten(1, 2)
            found.append(rows.amax(1) if self.reduce == "max" else rows.mean(1))
        return pooled(torch.stack(found, 1), self.kernel, "max")


def _alone(view: View, head: int, groups: int) -> View:
    """What one kv head and its query heads have of a view."""
    assert view.queries is not None
    first, last = (None if x is None else x[:, head : head + 1] for x in (view.first, view.last))
    return view._replace(
        keys=view.keys[:, head : head + 1],
        queries=view.queries[:, head * groups : (head + 1) * groups],
        first=first,
        last=last,
    )
