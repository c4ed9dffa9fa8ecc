"""Laws of looking ahead: the queries of a draft count as those of the prompt do."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.methods.draft import Draft
from kvtune.view import View

PLAIN = Draft(window=8, kernel=1)


def seen(ahead: int = 0, eager: int | None = None) -> View:
    """Returns 40 tokens before a window of 8 and a draft of `ahead`; its last query looks at
    token `eager`."""
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(2, 2, 48 + ahead, 16, generator=generator)
    query = torch.randn(2, 4, 8 + ahead, 16, generator=generator)
    if eager is not None:
        query[:, :, -1] = 4 * keys[:, :, eager].repeat_interleave(2, 1)
    before, last = keys.split([40, 8 + ahead], 2)
    return View(before, before, queries=query, last=last, seen=48, ahead=ahead)


def dense(view: View, rows: int) -> Tensor:
    """Returns attention [B, H, G, rows, T] of the last rows to the tokens that compete."""
    keys = torch.cat([view.keys, view.last], 2)
    query = view.queries[:, :, -rows:].unflatten(1, (2, 2))
    logits = query @ keys[:, :, None].transpose(-1, -2) / 4
    ones = torch.ones(rows, keys.shape[2], dtype=torch.bool)
    logits = logits.masked_fill(ones.triu(keys.shape[2] - rows + 1), float("-inf"))
    return logits.softmax(-1)[..., :40]


def test_the_score_is_the_most_of_all_rows_and_heads_of_a_group() -> None:
    view = seen(3)
    torch.testing.assert_close(PLAIN.score(view), dense(view, 11).amax((2, 3)))


def test_a_mean_may_stand_in_place_of_the_most() -> None:
    view = seen(3)
    mean = Draft(window=8, kernel=1, reduce="mean")
    torch.testing.assert_close(mean.score(view), dense(view, 11).mean((2, 3)))


def test_what_the_draft_looks_at_wins() -> None:
    assert (PLAIN.score(seen(5, eager=17)).argmax(-1) == 17).all()


def test_without_a_draft_the_window_alone_looks() -> None:
    view = seen()
    torch.testing.assert_close(PLAIN.score(view), dense(view, 8).amax((2, 3)))


def test_neighbours_of_what_is_looked_at_win_with_it() -> None:
    score = Draft(window=8, kernel=5).score(seen(5, eager=17))
    assert (score[..., 15:20] == score[..., 17:18]).all()
    assert (score[..., 17] == PLAIN.score(seen(5, eager=17))[..., 17]).all()
