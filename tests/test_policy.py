"""Laws of kvtune/policy.py: open windows, optional parts, heads that differ, and the way back."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kvtune import parts, space
from kvtune import recipe as recipes
from kvtune.cache import weigh
from kvtune.chains import Chain
from kvtune.cli import spelled
from kvtune.errors import IntegrityError, UsageError
from kvtune.models import Facts, LayerFacts
from kvtune.parts import Codec
from kvtune.policy import Policy, to_entry, to_policy
from kvtune.recipe import LayerPolicy, Recipe

KNOWN = Facts("Tiny", (LayerFacts("full_attention", 4, 8, 64),) * 2, 4096, 61)
FOUR = '[{ use = "affine", bits = 4 }]'
TWO = '[{ use = "affine", bits = 2, group = "head" }]'


def layer(more: str = "") -> Recipe:
    return recipes.loads(f'kvtune = 1\n[[layers]]\nspan = "all"\n{more}')


def chain(bits: int) -> Chain:
    codec = parts.parse({"use": "affine", "bits": bits})
    assert isinstance(codec, Codec)
    return Chain((codec,))


HEADED = f"""sinks = 4
recent = 64
kept.keys = {FOUR}
[[layers.heads]]
span = "0, 2"
kept.keys = {TWO}
kept.values = {TWO}
[[layers.heads]]
span = "last 1"
"""


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ("", {(0, 0)}),
        ("sinks = 3\nrecent = 7", {(3, 7)}),
        ("sinks = [0, 4]", {(0, 0), (4, 0)}),
        ("recent = [64, 128]\nsinks = 4", {(4, 64), (4, 128)}),
        ('sinks = "search"', {(0, 0), (4, 0), (16, 0)}),
        (
            'recent = "search"\nsinks = [1, 2]',
            {(sinks, recent) for sinks in (1, 2) for recent in (32, 64, 128, 256)},
        ),
    ],
)
def test_a_template_opens_the_product_of_its_windows(windows: str, expected: set[Any]) -> None:
    recipe = layer(windows)
    found = recipe.layers[0].windows()
    assert set(found) == expected
    assert len(found) == len(expected)
    assert recipe.is_open() == (len(expected) > 1)
    assert recipes.loads(recipe.dumps()) == recipe
    jsonschema.validate(tomllib.loads(recipe.dumps()), recipes.schema())


OPEN = {
    "sinks": 'sinks = "search"',
    "one window": "recent = [64]",
    "a setting": 'kept.keys = [{ use = "affine", bits = "search" }]',
    "a part": 'kept.values = [{ use = "hadamard", optional = true }]',
    "heads": f'heads = "search"\nkept.keys = {FOUR}',
}


@pytest.mark.parametrize("what", OPEN)
def test_what_is_open_is_applied_nowhere(what: str) -> None:
    recipe = layer(OPEN[what])
    assert recipe.is_open() and recipe.layers[0].is_open()
    assert recipe.layers[0].per_head == (what == "heads")
    with pytest.raises(UsageError, match=r"is a template.*kvtune search"):
        recipe.policies(KNOWN)
    assert recipes.loads(recipe.dumps()) == recipe
    jsonschema.validate(tomllib.loads(recipe.dumps()), recipes.schema())
    assert spelled.policy(recipe.layers[0])


REFUSED = {
    "no values": ("sinks = []", "1 to 16 values, not 0"),
    "a value twice": ("recent = [64, 64]", "each value once"),
    "too many values": (f"recent = {list(range(17))}", "1 to 16 values, not 17"),
    "a list of texts": ('sinks = ["4"]', "valid integer"),
    "a list of truths": ("sinks = [true]", "valid integer"),
    "a list in a list": ("sinks = [[4]]", "valid integer"),
    "a negative value": ("recent = [-1, 4]", "greater than or equal to 0"),
    "a word": ('recent = "find"', "valid integer"),
    "an optional text": ('kept.keys = [{ use = "affine", optional = "yes" }]', "optional is true"),
    "a truth that is false": ('kept.keys = [{ use = "affine", optional = false }]', "optional is"),
    "heads as a word": ('heads = "all"', 'a list of tables, or "search"'),
    "heads as a number": ("heads = 3", "heads"),
    "heads as numbers": ("heads = [1, 2]", "heads"),
    "an unknown key": ('[[layers.heads]]\nspan = "0"\nsinks = 4', "Did you mean|unknown key"),
    "an unknown side": ('[[layers.heads]]\nspan = "0"\nkept.key = []', "Did you mean 'keys'"),
    "no span": ("[[layers.heads]]\nkept.keys = []", "span: Field required"),
    "an odd span": ('[[layers.heads]]\nspan = "a"', "none of all"),
    "open heads": (
        '[[layers.heads]]\nspan = "0"\nkept.keys = [{ use = "affine", bits = "search" }]',
        "a layer that lists heads opens nothing",
    ),
    "heads beside an open window": (
        'sinks = "search"\n[[layers.heads]]\nspan = "0"',
        "a layer that lists heads opens nothing",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_window_part_or_head_is_refused_by_its_place(what: str) -> None:
    wrong, words = REFUSED[what]
    with pytest.raises(IntegrityError, match=words) as caught:
        layer(wrong)
    assert "layers.0" in str(caught.value)


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        (("0, 0",), "layer 0, heads: kv head 0 is covered twice"),
        (("0-1", "1"), "kv head 1 is covered twice"),
        (("4",), "does not fit a model with 4 kv heads"),
        (("first 5",), "longer than the model's 4 kv heads"),
        (("rest",), '"rest" stands twice, so kv heads'),
    ],
)
def test_heads_are_named_once_and_exist(spans: tuple[str, ...], words: str) -> None:
    recipe = layer("".join(f'[[layers.heads]]\nspan = "{span}"\n' for span in spans))
    with pytest.raises(UsageError, match=words):
        recipe.policies(KNOWN)


def test_a_recipe_that_names_its_model_names_its_heads() -> None:
    bound = (
        f'kvtune = 1\n[model]\nname = "x"\nfingerprint = "sha256:{"0" * 64}"\n'
        'architecture = "X"\nlayers = 2\nkv_heads = 2\nhead_dim = 64\n'
        '[[layers]]\nspan = "all"\n[[layers.heads]]\nspan = "2"\n'
    )
    with pytest.raises(IntegrityError, match=r"layers\.0, heads: .*2 kv heads"):
        recipes.loads(bound)
    assert recipes.loads(bound.replace('"2"', '"1"'))


def test_heads_of_one_policy_are_one_group() -> None:
    two, four = chain(2), chain(4)
    heads = [(four, two), (two, two), (four, two), (two, Chain())]
    policy = Policy.by_head(4, 64, heads)
    assert [group.heads for group in policy.heads] == [(0, 2), (1,), (3,)]
    assert (policy.keys, policy.values) == (four, two)
    assert policy.pairs == tuple(heads)
    assert policy == Policy.by_head(4, 64, heads)
    assert len({policy, Policy.by_head(4, 64, heads)}) == 1
    assert policy.payload_bits == (3 + 2 + 3 + 9) / 4
    assert Policy.by_head(4, 64, heads[:1] * 4) == Policy(sinks=4, recent=64, keys=four, values=two)
    dense = Policy.by_head(0, 0, [(Chain(), Chain()), (Chain(), two)])
    assert not dense.is_dense


@pytest.mark.parametrize("heads", [[0], [0, 0], [1, 3], [0, 2]])
def test_a_policy_covers_every_head_once(heads: list[int]) -> None:
    first = (tuple(heads), chain(4), chain(4))
    second = ((0,), chain(2), chain(2))
    with pytest.raises(ValueError, match="all kv heads, each once"):
        Policy.model_validate({"heads": (first, second)})


def test_a_headed_recipe_is_resolved_and_written_back() -> None:
    recipe = layer(HEADED)
    policy = recipe.policies(KNOWN)[0]
    assert [group.heads for group in policy.heads] == [(0, 2), (1,), (3,)]
    assert [str(group.keys) == "16-bit" for group in policy.heads] == [False, False, True]
    entry = to_entry(policy, "all")
    assert to_policy(entry, 4, "layer 0") == policy
    again = recipes.loads(Recipe(layers=(entry,)).dumps())
    assert again.policies(KNOWN)[0] == policy
    jsonschema.validate(tomllib.loads(again.dumps()), recipes.schema())


def test_every_policy_is_written_back(recipe_name: str, recipe_of: Any) -> None:
    known = Facts("Tiny", (LayerFacts("full_attention", 2, 4, 64),) * 4, 128, 61)
    for policy in recipe_of(recipe_name).policies(known):
        again = to_policy(to_entry(policy, "all"), 2, "layer 0")
        assert again.of_shape(2, 64) == policy


def test_bytes_and_payload_are_those_of_the_heads() -> None:
    """Four heads that differ weigh what a quarter of four layers of each would."""
    headed = layer(HEADED).policies(KNOWN)
    apart = [Policy(sinks=4, recent=64, keys=k, values=v) for k, v in headed[0].pairs]
    alone = [weigh((own,) * 2, KNOWN, 1000) for own in apart]
    found = weigh(headed, KNOWN, 1000)
    assert found.bytes == sum(one.bytes for one in alone) / 4
    assert found.payload_bits == sum(one.payload_bits for one in alone) / 4


def test_heads_are_told_in_words() -> None:
    words = spelled.policy(layer(HEADED).layers[0])
    assert words["exact"] == "first 4, last 64"
    assert words["keys"].startswith("affine bits=4")
    assert "heads 0, 2: affine bits=2" in words["keys"]
    assert "heads last 1: 16-bit" in words["keys"]
    other = layer(HEADED.replace("0, 2", "0"))
    assert spelled.differences(layer(HEADED), other, 2)
    opened = spelled.policy(layer('heads = "search"\nkept.values = [{ use = "affine" }]').layers[0])
    assert opened["values"].endswith("each head its own")


def test_an_optional_part_opens_the_chain_with_and_without_it(shipped: dict[str, Path]) -> None:
    table = {"use": "hadamard", "optional": True}
    assert [part and part.name() for part in parts.choices(table)] == ["hadamard", None]
    template = recipes.load(shipped["search-rotated.toml"])
    (choices,) = space.opened(template, KNOWN).values()
    for side in space.SIDES:
        chains = choices[0].chains(side)
        turned = {own.codecs[1:] for own in chains if len(own.codecs) == 2}
        assert turned == {own.codecs for own in chains if len(own.codecs) == 1}
        assert turned


def test_a_layer_with_nothing_open_has_plain_numbers() -> None:
    entry = LayerPolicy(span="all", sinks=4, recent=64)
    assert (entry.sinks, entry.recent) == (4, 64)
    assert not entry.is_open()
