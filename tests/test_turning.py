"""Laws of kvtune/turning.py: moments over the positions of a context, from pre-RoPE moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune import turning
from kvtune.models import ropes
from kvtune.rope import Rope

HEADS, DIM, COUNT = 2, 64, 300


@pytest.fixture
def rope(llama: Any) -> Rope:
    found = ropes(llama)[0]
    assert isinstance(found, Rope)
    return found


@pytest.fixture
def x() -> Tensor:
    """Vectors [H, n, D] with a mean and unlike channels."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 3, DIM, dtype=torch.float64)
    return torch.randn(HEADS, COUNT, DIM, dtype=torch.float64, generator=generator) * spread + 1


def everywhere(rope: Rope, x: Tensor, context: int) -> Tensor:
    """Every vector at every position [H, n * context, D]."""
    positions = torch.arange(context)
    spread = x[:, :, None].expand(-1, -1, context, -1).flatten(0, 1)[None]
    turned: Tensor = rope.turn(spread, positions)[0].unflatten(0, x.shape[:2]).flatten(1, 2)
    return turned


@pytest.mark.parametrize("context", [1, 7, 96])
@pytest.mark.parametrize("name", ["llama", "glm4", "gemma2"])
def test_moments_of_heads_together_are_those_of_every_vector_at_every_position(
    name: str, model: Any, context: int
) -> None:
    rope = next(iter(ropes(model).values()))
    dim = model.config.head_dim
    x = torch.randn(HEADS, 50, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x + x.roll(1, 0).flip(-1)  # heads that know each other
    every = everywhere(rope, x, context).transpose(0, 1).flatten(1)
    flat = x.transpose(0, 1).flatten(1)
    found = turning.together(rope, flat.T @ flat / len(flat), HEADS, context)
    torch.testing.assert_close(found, every.T @ every / len(every))


@pytest.mark.parametrize("context", [1, 7, 96])
def test_moments_of_a_context_are_those_of_every_vector_at_every_position(
    rope: Rope, x: Tensor, context: int
) -> None:
    every = everywhere(rope, x, context)
    first, second = x.mean(1), x.transpose(1, 2) @ x / COUNT
    torch.testing.assert_close(turning.mean(rope, first, context), every.mean(1))
    expected = every.transpose(1, 2) @ every / every.shape[1]
    torch.testing.assert_close(turning.moment(rope, second, context), expected)


def test_a_long_context_is_stood_for_by_some_of_its_positions(rope: Rope, x: Tensor) -> None:
    context = 3 * turning.POSITIONS
    second = x.transpose(1, 2) @ x / COUNT
    every = everywhere(rope, x[:, :20], context)
    few = turning.moment(rope, x[:, :20].transpose(1, 2) @ x[:, :20] / 20, context)
    whole = every.transpose(1, 2) @ every / every.shape[1]
    assert (few - whole).norm() < 0.02 * whole.norm()
    turned = turning.moment(rope, second, context)
    traces = (m.diagonal(dim1=1, dim2=2).sum(-1) for m in (turned, second))
    torch.testing.assert_close(*traces)


def test_turning_back_undoes_a_single_position(rope: Rope, x: Tensor) -> None:
    second = x.transpose(1, 2) @ x / COUNT
    back = turning.moment(rope, turning.moment(rope, second, 1), 1, inverse=True)
    torch.testing.assert_close(back, second)


@pytest.mark.parametrize("count", [1, 2, 5, 128])
def test_a_sample_goes_to_positions_of_its_own(rope: Rope, x: Tensor, count: int) -> None:
    context = 640
    found = turning.sample(rope, x[:, :count], context)
    everywhere_else = {
        tuple(rope.turn(x[:, i : i + 1][None], torch.tensor([p]))[0, 0, 0, :3].tolist())
        for i in range(count)
        for p in range(0, context, context // count)
    }
    assert found.shape == (HEADS, count, DIM)
    assert all(tuple(row[:3].tolist()) in everywhere_else for row in found[0])
    torch.testing.assert_close(found.norm(dim=-1), x[:, :count].norm(dim=-1))
