"""Laws of kvtune/entries.py: what a layer that selects tokens may say, and how it is refused."""

from __future__ import annotations

import jsonschema
import pytest

from kvtune import recipe as recipes
from kvtune import space
from kvtune.cache import layer_bytes, weigh
from kvtune.cli import spelled
from kvtune.entries import Tier
from kvtune.errors import IntegrityError, UsageError
from kvtune.fitted import blanks
from kvtune.models import Facts, LayerFacts
from kvtune.policy import Policy, to_entry, to_policy
from kvtune.recipe import Recipe

KNOWN = Facts("Tiny", (LayerFacts("full_attention", 4, 8, 64),) * 2, 4096, 61)
SELECT = 'select = { use = "attention", share = 0.25 }\n'
FOUR = '[{ use = "affine", bits = 4 }]'
TWO = '[{ use = "affine", bits = 2, group = "head" }]'


def layer(more: str) -> Recipe:
    return recipes.loads(f'kvtune = 1\n[[layers]]\nspan = "all"\n{more}')


SOUND = {
    "drop": SELECT,
    "drop-said": f'{SELECT}rest = "drop"',
    "default-share": 'select = { use = "attention" }',
    "dense-rest": f"{SELECT}rest = {{}}",
    "rest": f"{SELECT}rest.keys = {TWO}\nrest.values = {FOUR}",
    "all": f"sinks = 4\nrecent = 64\n{SELECT}kept.keys = {FOUR}\nrest.values = {TWO}",
}
REFUSED = {
    "rest-alone": ('rest = "drop"', "rest is what becomes of tokens that a selector passes over"),
    "rest-tier-alone": (f"rest.keys = {TWO}", "write select ="),
    "no-selector": (
        'select = { use = "affine" }',
        "affine is a quantizer; select takes a selector",
    ),
    "selector-as-codec": (
        'kept.keys = [{ use = "attention" }]',
        "attention is a selector; keys and values take codecs",
    ),
    "text": ('select = "attention"', "layers.0.select: expected a part"),
    "share": ('select = { use = "attention", share = 1.5 }', "1.5 is not above 0 and up to 1"),
    "setting": ('select = { use = "attention", shares = 0.5 }', "attention has no 'shares'"),
    "unknown": ('select = { use = "atention" }', "attention"),
    "open-share": ('select = { use = "attention", share = [1.0] }', "opens nothing below 1"),
    "open-rest": (
        f'{SELECT}rest.keys = [{{ use = "affine", bits = "search" }}]',
        "a layer that selects tokens is not searched",
    ),
    "open-window": (f'{SELECT}recent = "search"', "a layer that selects tokens is not searched"),
    "heads-select-alone": (
        '[[layers.heads]]\nspan = "0"\nselect = { use = "attention" }',
        "belong to a layer that selects tokens",
    ),
    "heads-and-allot": (
        f'{SELECT}allot = {{ use = "pyramid" }}\n[[layers.heads]]\nspan = "0"',
        "a layer lists its heads, or an allocator does",
    ),
    "merge-alone": ('merge = { use = "values_only" }', "belong to a layer that selects tokens"),
    "no-merger": (f'{SELECT}merge = {{ use = "affine" }}', "merge takes a merger"),
    "no-allocator": (f'{SELECT}allot = {{ use = "affine" }}', "allot takes an allocator"),
    "other-fate": (f'{SELECT}rest = "keep"', 'rest is "drop", or a tier'),
    "rest-key": (f"{SELECT}rest.kays = {TWO}", "unknown key layers.0.rest.kays"),
    "rest-codec": (f"{SELECT}rest.keys = [{{ use = 'affine', bits = 5 }}]", "layers.0.rest.keys"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_selection_is_read_as_it_was_written(name: str) -> None:
    recipe = layer(SOUND[name])
    assert recipes.loads(recipe.dumps()) == recipe
    jsonschema.validate(recipe.model_dump(mode="json", exclude_defaults=True), recipes.schema())
    for policy in recipe.policies(KNOWN):
        assert policy.select is not None
        assert to_policy(to_entry(policy, "all"), 4, "layer 0") == policy
        assert hash(policy) == hash(recipe.policies(KNOWN)[0])


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_selection_is_refused_in_words(name: str) -> None:
    body, words = REFUSED[name]
    with pytest.raises(IntegrityError) as caught:
        layer(body)
    assert words in str(caught.value)
    assert "Tier" not in str(caught.value).replace("layers", "")


def test_what_is_not_said_of_the_rest_is_that_it_is_dropped() -> None:
    said, unsaid = (layer(SOUND[name]).policies(KNOWN) for name in ("drop-said", "drop"))
    assert said == unsaid
    assert said[0].rest is None


def test_heads_that_select_have_budgets_of_their_own() -> None:
    body = 'select = { use = "snapkv", budget = 300 }\n[[layers.heads]]\nspan = "1"\n'
    policy = layer(f'{body}select = {{ use = "snapkv", budget = 100 }}').policies(KNOWN)[0]
    budgets = {own.heads: own.select.budget for own in policy.heads if own.select}
    assert budgets == {(0, 2, 3): 300, (1,): 100}
    weight = sum(layer_bytes(policy, 4, 64, 2048))
    alone = [sum(layer_bytes(own, len(heads), 64, 2048)) for heads, own in policy.parts()]
    assert weight == sum(alone), "stored bytes are the sum over heads"


def test_what_is_fitted_is_fitted_for_one_chain_of_a_side() -> None:
    """Tensors are named by side and method, so two chains would read each other's."""
    two, four = (f'[{{ use = "balance" }}, {own[1:]}' for own in (TWO, FOUR))
    apart = layer(f"{SELECT}kept.keys = {FOUR}\nrest.keys = {two}").policies(KNOWN)[0]
    alike = layer(f"{SELECT}kept.keys = {two}\nrest.keys = {two}").policies(KNOWN)[0]
    for policy in (apart, alike):
        assert list(blanks(3, policy, 4, 64)) == ["layer.3.keys.balance.factor"]
    with pytest.raises(UsageError, match="balance is fitted in both tiers"):
        layer(f"{SELECT}kept.keys = {four}\nrest.keys = {two}").policies(KNOWN)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_the_rest_must_fit_the_heads_as_well(side: str) -> None:
    narrow = Facts("Tiny", (LayerFacts("full_attention", 4, 8, 12),), 4096, 61)
    with pytest.raises(UsageError, match=f"layer 0, rest {side}: affine packs whole bytes"):
        layer(f"{SELECT}rest.{side} = {TWO}").policies(narrow)


def test_a_template_with_a_layer_that_selects_is_refused() -> None:
    more = '\n[[layers]]\nspan = "rest"\nkept.keys = [{ use = "affine", bits = "search" }]'
    template = recipes.loads(f'kvtune = 1\n[[layers]]\nspan = "first 1"\n{SELECT}{more}')
    assert template.is_open()
    with pytest.raises(UsageError, match="Layers first 1 select tokens in a template"):
        space.opened(template, KNOWN)


def test_bits_are_those_of_both_tiers_in_their_shares() -> None:
    policy = layer(SOUND["rest"]).policies(KNOWN)[0]
    assert policy.split
    kept = policy.split.kept / policy.split.block
    assert policy.payload_bits == pytest.approx(16 * kept + 3 * (1 - kept))
    dropped = layer(SELECT).policies(KNOWN)[0]
    assert dropped.payload_bits == pytest.approx(4)
    assert not dropped.is_dense
    with pytest.raises(ValueError, match="a rest, and what is merged, has a selector"):
        Policy(rest=policy.rest)


def test_true_bits_come_near_those_of_the_shares_in_a_long_context() -> None:
    dropped = weigh(layer(SELECT).policies(KNOWN), KNOWN, 4096)
    assert 4 <= dropped.bits < 4.2
    stored = weigh(
        layer(f"{SELECT}rest.keys = {TWO}\nrest.values = {TWO}").policies(KNOWN), KNOWN, 4096
    )
    assert 4 + 0.75 * 2.5 - 0.05 < stored.bits < 4 + 0.75 * 2.5 + 0.4


def test_a_selection_is_told_in_words() -> None:
    told = spelled.policy(layer(SOUND["all"]).layers[0])
    assert told["keys"].endswith("where attention share=0.25, rest 16-bit")
    assert told["values"].startswith("16-bit where attention share=0.25, rest affine bits=2")
    assert spelled.policy(layer(SELECT).layers[0])["keys"].endswith("rest dropped")


def test_a_dense_rest_is_stored() -> None:
    entry = layer(SOUND["dense-rest"]).layers[0]
    assert entry.rest == Tier()
    assert layer(SOUND["dense-rest"]).policies(KNOWN)[0].rest is not None
