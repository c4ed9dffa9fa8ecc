"""Laws of budgets that layers share: what is written, what it sums to, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune import fit, parts
from kvtune import recipe as recipes
from kvtune.allotted import allotted
from kvtune.bank import build
from kvtune.cache import load
from kvtune.errors import IntegrityError, UsageError
from kvtune.models import Facts, LayerFacts, facts, fingerprint
from kvtune.occupancy import occupancy
from kvtune.policy import Policy
from kvtune.prices import pulls
from kvtune.profile import Profile
from kvtune.recipe import Recipe
from kvtune.retention import Allocator

CONTEXT = 96
NAMES = [name for name in parts.names() if issubclass(parts.find(name), Allocator)]
READING = [name for name in NAMES if parts.find(name).reads]  # type: ignore[attr-defined]


def made(allot: str, select: str = "budget = 64", more: str = "", span: str = "all") -> Recipe:
    return recipes.loads(
        f'kvtune = 1\n[[layers]]\nspan = "{span}"\nsinks = 4\nrecent = 12\n'
        f'select = {{ use = "attention", {select} }}\nallot = {{ use = "{allot}" }}\n{more}'
    )


@pytest.fixture
def profile(llama: Any, draw: Any) -> Profile:
    """What calibration knows of the tokens of a tiny Llama."""
    own = llama.config._attn_implementation
    bank = build(llama, draw(2, CONTEXT + 17), CONTEXT, needs=frozenset({"attention"}))
    found = pulls(llama, bank, 0)
    tensors = {name: x.float() for name, x in occupancy(bank, found).items()}
    llama.set_attn_implementation(own)
    known = facts(llama.config)
    told = {**vars(known), "layers": [vars(layer) for layer in known.layers]}
    meta = {"facts": told, "fingerprint": fingerprint(llama), "layers": sorted(found)}
    return Profile((), tensors, meta)


def budgets(policies: tuple[Policy, ...], heads: int) -> Tensor:
    """Returns the budget, or share, of every head of every layer, [L, H]."""
    rows = []
    for policy in policies:
        assert policy.select is not None
        row = [policy.select] * heads
        for group in policy.heads:
            for head in group.heads:
                assert group.select is not None
                row[head] = group.select
        rows.append([float(own.budget or own.share) for own in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_writes_budgets_of_the_same_sum(name: str, llama: Any, profile: Profile) -> None:
    known = facts(llama.config)
    found, tensors = fit.fit(made(name), profile)
    assert not tensors and all(entry.allot is None for entry in found.layers)
    read_back = recipes.loads(found.dumps())
    assert read_back == found
    rows = budgets(read_back.policies(known), known.layers[0].kv_heads)
    assert float(rows.mean()) == 64
    assert rows.min() > 16


@pytest.mark.parametrize("name", READING)
def test_what_is_measured_moves_budgets(name: str, llama: Any, profile: Profile) -> None:
    known = facts(llama.config)
    heads = known.layers[0].kv_heads
    rows = budgets(fit.fit(made(name, "budget = 400"), profile)[0].policies(known), heads)
    assert rows.unique().numel() > 1
    per_head = parts.find(name).per_head  # type: ignore[attr-defined]
    assert per_head == bool((rows[:, :1] != rows).any())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.005, 0.2, 1.0])
def test_a_share_keeps_its_mean_and_has_four_digits(
    name: str, share: float, llama: Any, profile: Profile
) -> None:
    known = facts(llama.config)
    found = fit.fit(made(name, f"share = {share}"), profile)[0]
    rows = budgets(found.policies(known), known.layers[0].kv_heads)
    assert float(rows.mean()) == pytest.approx(share, abs=1e-3)
    assert torch.equal(rows, (rows * 1e4).round() / 1e4)
    assert rows.min() >= min(share, 0.01) and rows.max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_fitted_recipe_generates(name: str, llama: Any, profile: Profile, draw: Any) -> None:
    found = fit.fit(made(name, "budget = 40", "kept.values = []\n"), profile)[0]
    cache = load(found, llama)
    tokens = draw(2, 120)
    with torch.no_grad():
        out = llama.generate(tokens, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 124)


def test_codes_get_whole_blocks_of_tokens(llama: Any, profile: Profile) -> None:
    codes = 'kept.keys = [{ use = "affine", bits = 4, group = 32, axis = "channel" }]\n'
    for name in NAMES:
        found = fit.fit(made(name, "budget = 500", codes), profile)[0]
        rows = budgets(found.policies(facts(llama.config)), 2) - 16
        assert torch.equal(rows % 64, torch.zeros_like(rows))
        assert rows.min() >= 64
        assert float(rows.mean()) == 448, "as 484 are rounded down in every layer"


def known_of(kinds: str, heads: int = 2) -> Facts:
    layer = {"f": "full_attention", "s": "sliding_attention"}
    layers = tuple(LayerFacts(layer[kind], heads, 4, 64) for kind in kinds)
    return Facts("Tiny", layers, 4096, 61)


def test_a_recipe_without_a_profile_has_what_reads_nothing() -> None:
    policies = made("pyramid").policies(known_of("fff"))
    assert [own.select.budget for own in policies if own.select] == [109, 64, 19]
    assert made("uniform").policies(known_of("fff"))[0] == policies[1]


@pytest.mark.parametrize("name", READING)
def test_what_reads_a_profile_is_refused_without_one(name: str) -> None:
    with pytest.raises(UsageError, match=f"layers all: {name} shares the budget") as caught:
        made(name).policies(known_of("fff"))
    assert "kvtune fit RECIPE --profile" in str(caught.value.hint)


def test_an_older_profile_is_refused_in_words(profile: Profile) -> None:
    older = Profile((), {}, profile.meta)
    with pytest.raises(IntegrityError, match=r"The profile lacks tokens.curves") as caught:
        fit.fit(made("prefix"), older)
    assert "kvtune calibrate MODEL" in str(caught.value.hint)


def test_layers_of_equal_budgets_share_an_entry() -> None:
    curves = torch.linspace(0, 1, 257).expand(4, 257).clone()
    curves[:2] = curves[:2].sqrt()
    found = allotted(made("prefix").layers, known_of("ffff"), lambda _, layers: curves[layers])
    assert [entry.span for entry in found] == ["0-1", "2-3"]
    assert found[0].select and found[1].select
    assert found[0].select["budget"] + found[1].select["budget"] == 128
    assert found[0].select["budget"] < found[1].select["budget"]
    assert [entry.sinks for entry in found] == [4, 4]


def test_only_the_layers_of_the_span_share_and_others_stay_as_they_are() -> None:
    text = made("pyramid", span="1-3").dumps() + '[[layers]]\nspan = "rest"\nrecent = 8\n'
    recipe = recipes.loads(text)
    found = allotted(recipe.layers, known_of("fffff"))
    assert [entry.span for entry in found] == ["1", "2", "3", "rest"]
    assert [own.recent for own in recipe.policies(known_of("fffff"))] == [8, 12, 12, 12, 8]


def test_layers_that_are_not_compressed_stand_in_the_span_and_get_nothing() -> None:
    recipe = made("pyramid")
    policies = recipe.policies(known_of("sfsf"))
    assert [own.select.budget if own.select else None for own in policies] == [None, 109, None, 19]
    asked = []

    def read(name: str, layers: Any) -> Tensor:
        asked.append((name, layers))
        return torch.ones(len(layers), 257).cumsum(1) / 257

    found = allotted(made("prefix").layers, known_of("sfsf"), read)
    assert asked == [("tokens.curves", [1, 3])]
    assert [entry.span for entry in found] == ["0-3"]


def test_heads_of_other_budgets_are_listed() -> None:
    scores = torch.linspace(1, 0, 257).expand(1, 3, 257).clone()
    scores[:, 0] = scores[:, 0] ** 8
    codes = 'kept.values = [{ use = "affine", bits = 4 }]\n'
    recipe = made("ada", "budget = 208", codes)
    found = allotted(recipe.layers, known_of("f", 3), lambda *_: scores)
    (entry,) = found
    assert entry.select and not isinstance(entry.heads, str)
    (head,) = entry.heads
    assert head.select
    assert (head.span, head.kept) == ("0", entry.kept)
    assert head.select["budget"] + 2 * entry.select["budget"] == 3 * 208
    assert head.select["budget"] < entry.select["budget"]


def test_a_budget_without_room_is_refused_as_without_an_allocator() -> None:
    with pytest.raises(UsageError, match="a budget of 16 tokens leaves no room"):
        made("pyramid", "budget = 16").policies(known_of("fff"))


def test_entries_that_share_nothing_out_stay_the_same(recipe_of: Any) -> None:
    entries = recipe_of("klt-k2").layers
    assert allotted(entries, known_of("f")) == entries


def test_a_shipped_recipe_says_its_budgets(profile: Profile, tmp_path: Path, llama: Any) -> None:
    found, tensors = fit.fit(made("priced"), profile)
    fit.ship(found, tensors, tmp_path / "recipe.toml")
    assert "allot" not in (tmp_path / "recipe.toml").read_text()
    assert load(tmp_path, llama) is not None
