"""Laws of retrieval heads: only those that are chosen look, each at its own kv head."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.methods.retrieval_heads import RetrievalHeads
from kvtune.view import Spot, View

PLAIN = RetrievalHeads(kernel=1)


def seen(heads: list[int], query: Tensor | None = None) -> View:
    """Returns 30 tokens of 2 kv heads before a window of 8; 4 query heads look, of which some
    count."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(1, 2, 38, 16, generator=generator)
    own = torch.randn(1, 4, 8, 16, generator=generator) if query is None else query
    chosen = torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(heads).long(), True)
    spot = Spot(tensors={"retrieval_heads.heads": chosen})
    before, window = keys.split([30, 8], 2)
    return View(before, before, queries=own, last=window, seen=38, spot=spot)


def test_other_heads_do_not_count() -> None:
    view = seen([1, 2])
    other = view.queries.clone()
    other[:, [0, 3]] = 5.0
    assert torch.equal(PLAIN.score(view), PLAIN.score(seen([1, 2], other)))
    assert not torch.equal(PLAIN.score(view), PLAIN.score(seen([0, 2])))


def test_a_head_looks_at_its_own_kv_head() -> None:
    view, other = seen([3]), seen([3])
    other.keys[:, 0] = 7.0  # kv head 0 belongs to query heads 0 and 1
    assert torch.equal(PLAIN.score(view), PLAIN.score(other))
    other.keys[:, 1, 4] = 7.0
    assert not torch.equal(PLAIN.score(view), PLAIN.score(other))


def test_all_kv_heads_keep_the_same_tokens() -> None:
    score = RetrievalHeads().score(seen([0, 3]))
    assert torch.equal(score[:, 0], score[:, 1])


def test_several_heads_count_as_their_mean() -> None:
    one, two, both = (PLAIN.score(seen(heads)) for heads in ([0], [3], [0, 3]))
    torch.testing.assert_close(both, (one + two) / 2)


def test_the_window_takes_its_part() -> None:
    score = PLAIN.score(seen([0]))
    assert (score.sum(-1) < 8).all(), "eight rows sum to one each, and the window is a part of them"


def test_where_no_head_counts_all_do() -> None:
    """So that a layer whose kv heads follow different policies may leave some without one."""
    torch.testing.assert_close(PLAIN.score(seen([])), PLAIN.score(seen([0, 1, 2, 3])))


def test_so_many_heads_of_the_best_scores_are_chosen() -> None:
    scores = torch.tensor([0.1, 0.5, 0.2, 0.4, 0.3])
    assert RetrievalHeads(first=2).fit({"retrieval.scores": scores})["heads"].tolist() == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert RetrievalHeads(first=8).fit({"retrieval.scores": scores})["heads"].all()
