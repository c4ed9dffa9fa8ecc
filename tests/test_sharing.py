"""Laws of kvtune/sharing.py and of share in recipes: who stores together, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtune import recipe as recipes
from kvtune import space
from kvtune.bonds import Claims
from kvtune.cli import spelled
from kvtune.errors import IntegrityError, UsageError
from kvtune.models import FULL, Facts, LayerFacts
from kvtune.policy import to_entry
from kvtune.recipe import Recipe
from kvtune.sharing import groups, pieces, units

WIDE, SLIDING = LayerFacts(FULL, 4, 8, 64), LayerFacts("sliding_attention", 4, 8, 64, 24)
NARROW = LayerFacts(FULL, 1, 8, 64)
XKV = 'share = { use = "xkv", layers = 4 }\n'


def known(*layers: LayerFacts) -> Facts:
    return Facts("Tiny", layers, 4096, 61)


def made(*spans: tuple[str, str]) -> Recipe:
    return recipes.loads(
        "kvtune = 1\n" + "".join(f'[[layers]]\nspan = "{span}"\n{body}' for span, body in spans)
    )


@pytest.mark.parametrize(
    ("spans", "layers", "expected"),
    [
        ([("all", XKV)], [WIDE] * 9, ((0, 1, 2, 3), (4, 5, 6, 7), (8,))),
        ([("all", XKV)], [WIDE, SLIDING, WIDE, WIDE], ((0, 2, 3),)),
        ([("all", XKV)], [WIDE, NARROW, NARROW, WIDE], ((0,), (1, 2), (3,))),
        ([("2", ""), ("rest", XKV)], [WIDE] * 5, ((0, 1), (3, 4))),
        ([("0-2", XKV), ("rest", f"recent = 8\n{XKV}")], [WIDE] * 5, ((0, 1, 2), (3, 4))),
        ([("all", 'share = { use = "minicache" }\n')], [WIDE] * 5, ((0, 1), (2, 3), (4,))),
        ([("all", 'share = { use = "xkv", layers = 1 }\n')], [WIDE] * 2, ((0,), (1,))),
        ([("all", "recent = 8\n")], [WIDE] * 3, ()),
    ],
    ids=str,
)
def test_groups_are_runs_of_equal_full_attention_layers(
    spans: Any, layers: list[LayerFacts], expected: Any
) -> None:
    policies = made(*spans).policies(known(*layers))
    assert groups(policies, layers) == expected
    again = units(policies, layers)
    assert sorted(index for unit in again for index in unit) == list(range(len(layers)))
    assert set(expected) <= set(again)


def test_owners_stand_with_their_borrowers() -> None:
    read = 'share = { use = "owner", layer = 1 }\n'
    policies = made(("2, 4", read), ("rest", "")).policies(known(*[WIDE] * 5))
    assert units(policies, [WIDE] * 5) == ((0,), (1, 2, 4), (3,))


@pytest.mark.parametrize("count", [1, 30, 200])
@pytest.mark.parametrize("seen", [0, 63, 64, 65, 200])
def test_pieces_end_where_blocks_leave(seen: int, count: int) -> None:
    policies = made(("all", f"sinks = 2\nrecent = 9\n{XKV}")).policies(known(*[WIDE] * 5))
    found = pieces(policies, seen, count)
    assert sum(found) == count
    for policy in policies:
        place = seen
        for size in found:
            assert policy.due(place) == policy.due(place + size - 1)
            place += size
    assert len(found) <= 1 + 2 * -(-count // 64)
    assert pieces(made(("all", "")).policies(known(WIDE)), seen, count) == [count]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('share = { use = "affine" }\n', "affine is a quantizer; share takes a sharer"),
        ('share = { use = "nothing" }\n', "nothing"),
        ('share = { use = "xkv", layers = "search" }\n', "xkv is not searched here"),
        ('share = "xkv"\n', "expected a part such as"),
        (f'{XKV}select = {{ use = "attention" }}\n', "leave select and heads out"),
        (f'{XKV}heads = [{{ span = "0" }}]\n', "leave select and heads out"),
        (f'{XKV}recent = "search"\n', "layers that share are not searched"),
        (f'{XKV}kept.keys = [{{ use = "affine", bits = "search" }}]\n', "are not searched"),
        (f"{XKV}shared = 1\n", "unknown key"),
        ('share = { use = "xkv", rank = 1 }\n', "xkv has no 'rank'"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused_where_it_stands(body: str, why: str) -> None:
    with pytest.raises(IntegrityError, match=why):
        made(("all", body))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f'{XKV}kept.keys = [{{ use = "derope" }}]\n', "derope turns keys by their positions"),
        (f'{XKV}kept.keys = [{{ use = "klt" }}]\n', "klt.* is fitted to one layer"),
        (
            f'{XKV}kept.values = [{{ use = "affine", group = 64 }}]\n',
            "layer 0, share: affine per token: group 64 does not divide head_dim 144",
        ),
    ],
    ids=str,
)
def test_chains_that_do_not_fit_what_is_shared_are_refused(body: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        made(("all", body)).policies(known(*[WIDE] * 4))


def test_a_template_with_layers_that_share_is_refused() -> None:
    open_ = 'kept.keys = [{ use = "affine", bits = "search" }]\n'
    template = made(("first 1", XKV), ("rest", open_))
    with pytest.raises(UsageError, match="Layers first 1 share their cache in a template"):
        space.opened(template, known(*[WIDE] * 4))


@pytest.mark.parametrize("body", [XKV, f"recent = 8\n{XKV}", 'share = { use = "owner" }\n'])
def test_a_policy_goes_back_to_the_entry_that_it_came_from(body: str) -> None:
    recipe = made(("1-2", body), ("rest", ""))
    policies = recipe.policies(known(*[WIDE] * 4))
    entry = to_entry(policies[1], "1-2")
    assert recipes.loads(Recipe(layers=(entry, recipe.layers[1])).dumps()).layers[0] == entry
    assert Recipe(layers=(entry, recipe.layers[1])).policies(known(*[WIDE] * 4)) == policies
    assert hash(policies[1]) != hash(policies[0])
    assert not policies[1].is_dense


def test_a_share_is_told_in_words_and_in_the_schema() -> None:
    told = spelled.policy(
        made(("all", f'recent = 8\nkept.keys = [{{ use = "affine" }}]\n{XKV}')).layers[0]
    )
    assert told["keys"].startswith("xkv layers=4 block=64")
    assert " > affine bits=4" in told["keys"]
    assert told["exact"] == "last 8"
    assert ">" not in told["values"]
    named = recipes.schema()["$defs"]["Shares"]["oneOf"]
    uses = {one["properties"]["use"]["const"] for one in named}
    assert uses == {"xkv", "minicache", "owner"}


def test_what_members_ask_for_is_made_once_for_all_of_them() -> None:
    claims, made_ = Claims[object](2), []

    def make() -> object:
        made_.append(object())
        return made_[-1]

    first, other = claims.get("a", 0, make), claims.get("b", 0, make)
    assert claims.get("a", 1, make) is first
    assert claims.get("b", 1, make) is other
    assert claims.get("a", 0, make) is not first, "all have had it"
    again = claims.get("a", 0, make)
    assert again is made_[-1], "who asks twice starts anew"
    assert claims.get("a", 1, make) is again
    claims.get("c", 0, make)
    claims.clear()
    assert claims.get("c", 1, make) is made_[-1]
    assert len(made_) == 6


def test_a_twin_of_one_layer_alone_can_be_read(model_of: Any, play: Any, draw: Any) -> None:
    """It waits for ever for the twins of its neighbours, and reads what it was brought exactly."""
    from kvtune.cache import load

    model = model_of("llama", num_hidden_layers=2, head_dim=16)
    recipe = made(("all", 'share = { use = "minicache" }\n'))
    cache, tokens = load(recipe, model), draw(1, 128)
    play(model, cache, tokens, [128])
    twin = cache.layers[0].fork()
    x = torch.ones(1, 2, 70, 16, dtype=torch.float64)
    twin.update(x, x)
    twin.attend(torch.ones(1, 4, 70, 16, dtype=torch.float64), None, None, None)
    rows = twin.groups[0].rows
    assert rows.keys.tokens == 192
    assert torch.equal(rows.read(torch.float64)[0][:, :, 128:], x)
    assert cache.layers[0].groups[0].rows.keys.tokens == 128
