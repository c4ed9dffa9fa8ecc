"""Laws of kvtune/pooling.py: what a value weighs, and a first stage above all others."""

from __future__ import annotations

import pytest
import torch
from scorer_views import BATCH, HEADS, drawn, view_of
from torch.testing import assert_close

from kvtune.pooling import pooled, raised, weight


@pytest.mark.parametrize("held", [1, 50, 1 << 24], ids=lambda held: f"held{held}")
@pytest.mark.parametrize("group", [1, 3])
def test_a_value_weighs_what_the_output_projection_makes_of_it(
    group: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtune.pooling.LOGITS", held)
    view = view_of(20, group=group)
    output = view.spot.output
    assert output is not None
    for head in range(HEADS):
        own = output[head * group : (head + 1) * group]
        each = torch.stack([(view.values[:, head] @ one).abs().sum(-1) for one in own])
        assert_close(weight(view)[:, head], each.mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("output", [True, False])
def test_weights_of_16_bits_are_in_float32(output: bool, dtype: torch.dtype) -> None:
    found = weight(view_of(20, dtype=dtype, output=output))
    assert found.dtype == torch.float32
    assert_close(found, weight(view_of(20, output=output)), rtol=0.05, atol=0.05)


def test_without_a_projection_a_value_weighs_its_length() -> None:
    view = view_of(20, output=False)
    assert_close(weight(view), view.values.norm(dim=-1))


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 4), (2, 3, 5, 30), (2, 0)], ids=str)
def test_pooling_keeps_the_shape(shape: tuple[int, ...], kernel: int, pool: str) -> None:
    x = torch.ones(shape)
    found = pooled(x, kernel, pool)
    assert found.shape == x.shape
    if pool == "max" or kernel == 1:
        assert torch.equal(found, x)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e6])
def test_a_first_stage_stands_above_all_others_of_its_row(size: float) -> None:
    score = drawn(BATCH, HEADS, 50).abs() * size
    score[:, 0] *= 100  # another head's are larger
    first = drawn(BATCH, HEADS, 50, seed=1) > 0.5
    by = drawn(BATCH, HEADS, 50, seed=2).abs().clamp(max=1)
    found = raised(score, first, by)
    for row in range(BATCH):
        assert found[row][first[row]].min() > found[row][~first[row]].max()
    assert torch.equal(found[~first], score[~first])
