"""Shortening: which tokens of a prompt a model is given at all (the recipe key `prefill`)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvtune.parts import Part


class Shortener(Part):
    """Chooses tokens of a prompt by what a draft model looks at, before the model reads any."""

    kind = "shortener"
    budget: Annotated[int, Field(ge=1, le=1 << 24)] = 2048  # tokens of a prompt that are read
    window: int = 64  # the last tokens, whose queries look, and which always stay
    skip: int = 8  # the draft's first layers, which are not asked

    @abstractmethod
    def keep(self, score: Tensor) -> Tensor:
        """Returns the positions [n] of a prompt that stay, ascending, by scores [T]: all of up to
        `budget` tokens."""


def row_weights(window: int, ahead: int) -> Tensor:
    """What the rows of attention count [window + ahead]: those of a prompt from 0 to 1, the later
    the more, and those of tokens behind it in full."""
    return torch.cat([torch.linspace(0, 1, window), torch.ones(ahead)])


def peak(rows: Tensor, weights: Tensor) -> Tensor:
    """The most [T] that a token gets of attention rows [Hq, n, T], by their weights [n]."""
    return (rows * weights.to(rows)[:, None]).amax((0, 1))


def chosen(score: Tensor, budget: int, window: int, reach: int) -> Tensor:
    """Positions [n] that stay of a prompt with scores [T], ascending.

    The last `window` do, and the best of the others until there are `budget`: a token is as good as
    the best within `reach` of it, and brings those within `reach` of itself along. Of equal ones
    that first which is nearer to what is looked at, then the later.
    """
    length = score.shape[0]
    if length <= budget:
        return torch.arange(length, device=score.device)
    keys = [score.clone()]
    for _ in range(2):  # once to smooth, and once more for the neighbours of what wins
        keys.append(max_pool1d(keys[-1][None, None], 2 * reach + 1, 1, reach)[0, 0])
    order = torch.arange(length, device=score.device).flip(0)
    for key in keys:
        key[-window:] = float("inf")
        order = order[key[order].argsort(descending=True, stable=True)]
    return order[:budget].sort().values
