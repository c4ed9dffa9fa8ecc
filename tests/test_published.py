"""Laws of the shipped recipes of published methods that select tokens: how many each keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvtune import parts
from kvtune import recipe as recipes
from kvtune.allotted import allotted
from kvtune.cache import load
from kvtune.errors import UsageError
from kvtune.models import facts
from kvtune.recipe import Recipe
from kvtune.retention import Allocator, Selector

# by the name of a file: tokens of 2,200 that a layer holds, sinks and window included, on average
HELD = {
    "critical-kv": 1024,
    "defensive-kv": 32 + (2200 - 32) * 0.2,
    "expected-attention": 132 + (2200 - 132) * 0.5,
    "h2o": 410,
    "keydiff": 2048,
    "lagkv": 1024,
    "look-m": 205 + (2200 - 205) * 0.11,
    "pyramidkv": 128,
    "snapkv": 1024,
    "tova": 512,
}
FITTED = {"adakv": 1024, "compresskv": 256, "d2o": 410, "prefixkv": 0.2, "priced-heads": 1024}
FED = ("kvzip", "speckv", "specpc")  # what reads more than a prompt


def select_of(recipe: Recipe) -> Selector:
    found = parts.parse(recipe.layers[-1].select or {})
    assert isinstance(found, Selector)
    return found


@pytest.mark.parametrize("name", [*HELD, *FITTED, *FED])
def test_a_recipe_goes_by_the_name_of_its_file(name: str, shipped: dict[str, Path]) -> None:
    assert recipes.load(shipped[f"{name}.toml"]).name == name


@pytest.mark.parametrize("name", HELD)
def test_a_published_method_keeps_as_many_tokens_as_it_says(
    name: str, shipped: dict[str, Path], llama: Any
) -> None:
    cache = load(recipes.load(shipped[f"{name}.toml"]), llama)
    torch.manual_seed(0)
    for size in (2200, *[1] * 40):
        for layer in cache.layers:
            keys, values = torch.randn(2, 1, 2, size, 64)
            layer.update(keys, values)
            out = layer.attend(torch.randn(1, 4, size, 64), None, None, None)
            assert out.isfinite().all()
        if size > 1:
            held = [layer.groups[0].rows.read(torch.float32)[0].shape[2] for layer in cache.layers]
            # by share the window is a block longer at most
            select = select_of(recipes.load(shipped[f"{name}.toml"]))
            slack = 0 if select.budget else 100
            assert 0 <= sum(held) / len(held) - HELD[name] <= slack
    assert cache.get_seq_length() == 2240


@pytest.mark.parametrize("name", FITTED)
def test_what_needs_a_profile_says_which_command_shares_out_the_budget(
    name: str, shipped: dict[str, Path], llama: Any
) -> None:
    recipe, known = recipes.load(shipped[f"{name}.toml"]), facts(llama.config)
    with pytest.raises(UsageError, match="kvtune fit"):
        recipe.policies(known)
    allocator = parts.parse(recipe.layers[-1].allot or {})
    assert isinstance(allocator, Allocator)
    draw = torch.Generator().manual_seed(0)

    def read(row: str, layers: Any) -> torch.Tensor:
        if row == "tokens.prices_by_head":  # of shares kept and what they cost, less with more
            shares = torch.tensor([0.1, 0.25, 0.5, 1.0]).expand(len(layers), 2, 4)
            costs = torch.rand(len(layers), 2, 4, generator=draw).sort(-1, descending=True).values
            return torch.stack([shares, costs], -1)
        shape = {"tokens.heads": (2, 257), "tokens.curves": (257,)}.get(row, ())
        drawn = torch.rand(len(layers), *shape, generator=draw)
        if row == "tokens.curves":
            return drawn.sort(-1).values.index_fill(1, torch.tensor([256]), 1.0)
        return drawn.sort(-1, descending=True).values if shape else drawn

    found = allotted(recipe.layers, known, read)
    given = recipe.model_copy(update={"layers": found}).policies(known)
    amounts: list[float] = []
    for policy in given:
        heads = [group.select or policy.select for group in policy.heads for _ in group.heads]
        own = heads or [policy.select] * 2
        amounts += [(s.budget or s.share) for s in own if s is not None]
    assert len(amounts) == (2 if name == "d2o" else 8)
    assert sum(amounts) / len(amounts) == pytest.approx(FITTED[name], rel=1e-3)
