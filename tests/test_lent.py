"""Laws of lent caches: layers that read another's, because a recipe says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvtune import recipe as recipes
from kvtune.bank import build
from kvtune.cache import load, weigh
from kvtune.errors import UnsupportedError, UsageError
from kvtune.lent import BorrowingLayer, LendingLayer
from kvtune.measure import Bench
from kvtune.models import facts
from kvtune.prove import by_generation
from kvtune.recipe import Recipe

TIGHT = {"atol": 1e-9, "rtol": 1e-9}
CONTEXT, MORE = 80, 64
FOUR = '[{ use = "affine", bits = 4, group = "head" }]'
OWN = {
    "exact": "",
    "four-bits": f"sinks = 3\nrecent = 9\nkept.keys = {FOUR}\nkept.values = {FOUR}\n",
    "svd": 'recent = 9\nkept.keys = [{ use = "derope" }, { use = "svd", rank = 0.25 }]\n',
}
every_own = pytest.mark.parametrize("own", OWN)


def made(own: str = "", borrowers: str = "1, 3", owner: int = 0, rest: str = "2") -> Recipe:
    """A recipe for four layers, of which some read another."""
    share = f'share = {{ use = "owner", layer = {owner} }}\n'
    return recipes.loads(
        f'kvtune = 1\n[[layers]]\nspan = "{borrowers}"\n{share}'
        f'[[layers]]\nspan = "rest"\n{OWN.get(own, own)}'
    )


@pytest.fixture(scope="module")
def small(model_of: Any) -> Any:
    """A Llama of four layers, of which 1 and 3 read the same as 0 does, and attend alike."""
    return model_of("llama", num_hidden_layers=4, head_dim=16)


def patched(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes layers 1 and 3 compute the keys and values of layer 0, from what layer 0 was given."""
    for side in ("k_proj", "v_proj"):
        first = getattr(model.model.layers[0].self_attn, side)
        said: dict[str, Any] = {}

        def forward(x: Any, own: Any = first.forward, said: dict[str, Any] = said) -> Any:
            said["last"] = own(x)
            return said["last"]

        monkeypatch.setattr(first, "forward", forward)
        for index in (1, 3):
            other = getattr(model.model.layers[index].self_attn, side)
            monkeypatch.setattr(other, "forward", lambda x, said=said: said["last"])
    return model


@pytest.mark.parametrize("sizes", [[CONTEXT, *[1] * MORE], [CONTEXT, 30, 1, 33]], ids=len)
@pytest.mark.parametrize("own", ["exact", "four-bits"])
def test_layers_that_make_equal_keys_and_values_lose_nothing_by_sharing(
    small: Any, own: str, sizes: list[int], monkeypatch: Any, play: Any, draw: Any
) -> None:
    model, tokens = patched(small, monkeypatch), draw(2, CONTEXT + MORE)
    found = play(model, load(made(own), model), tokens, sizes)
    alone = recipes.loads(f'kvtune = 1\n[[layers]]\nspan = "all"\n{OWN[own]}')
    if own == "exact":
        expected = play(model, DynamicCache(config=model.config), tokens, sizes)
    else:
        expected = play(model, load(alone, model), tokens, sizes)
    torch.testing.assert_close(found, expected, **TIGHT)


@every_own
def test_chunks_equal_steps_and_a_prompt_is_read_exactly_by_all(
    small: Any, own: str, play: Any, draw: Any
) -> None:
    tokens, caches = draw(2, CONTEXT + MORE), [load(made(own), small) for _ in range(2)]
    steps = play(small, caches[0], tokens, [CONTEXT, *[1] * MORE])
    chunks = play(small, caches[1], tokens, [CONTEXT, 5, 50, MORE - 55])
    torch.testing.assert_close(chunks, steps, **TIGHT)
    exact = play(small, load(made("exact"), small), tokens, [CONTEXT, MORE])
    torch.testing.assert_close(steps[:, :CONTEXT], exact[:, :CONTEXT], **TIGHT)
    assert caches[0].get_seq_length() == CONTEXT + MORE
    owner, *others = caches[0].layers
    assert isinstance(owner, LendingLayer)
    assert [isinstance(layer, BorrowingLayer) for layer in others] == [True, False, True]
    assert owner.nbytes > 0 == others[0].nbytes


@every_own
def test_a_padded_row_is_the_row_alone(small: Any, own: str, play: Any, draw: Any) -> None:
    pads, sizes = (0, 9, 60, 9), [*[1] * 20, MORE - 20]
    tokens, mask = draw(4, CONTEXT + MORE), torch.ones(4, CONTEXT + MORE, dtype=torch.long)
    for row, pad in enumerate(pads):
        tokens[row, :pad], mask[row, :pad] = 0, 0
    found = play(small, load(made(own), small), tokens, [CONTEXT, *sizes], mask)
    for row, pad in enumerate(pads):
        alone = play(
            small, load(made(own), small), tokens[row : row + 1, pad:], [CONTEXT - pad, *sizes]
        )
        torch.testing.assert_close(found[row, CONTEXT:], alone[0, CONTEXT - pad :], **TIGHT)


@every_own
def test_bank_measurement_equals_generation(small: Any, own: str, draw: Any) -> None:
    recipe = made(own)
    policies = recipe.policies(facts(small.config))
    bank = build(small, draw(2, CONTEXT + MORE + 1), CONTEXT)
    bench = Bench(small, bank, load(recipe, small)._made_of[2])
    measured = bench.measure(policies)
    generated = by_generation(small, load(recipe, small), bank, MORE)
    went_on = by_generation(small, bench.cache(policies), bank, MORE)
    torch.testing.assert_close(measured.kl, generated.kl, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(measured.kl, went_on.kl, atol=1e-5, rtol=1e-3)
    assert torch.equal(bench.measure(policies).kl, measured.kl), "the memo is as it was"
    half = bench.measure(policies, rows=range(1, 2))
    torch.testing.assert_close(half.kl[0], measured.kl[1], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("own", ["exact", "four-bits"])  # of svd every token leaves on its own
def test_beams_are_followed_and_cropped_tokens_forgotten(
    small: Any, own: str, play: Any, draw: Any
) -> None:
    tokens, beams = draw(3, CONTEXT + MORE), torch.tensor([1, 1, 0])
    cache = load(made(own), small)
    play(small, cache, tokens[:, :CONTEXT], [CONTEXT])
    play(small, cache, draw(3, 2, seed=3), [1, 1])
    cache.crop(-2)
    cache.reorder_cache(beams)
    found = play(small, cache, tokens[beams][:, CONTEXT:], [1, MORE - 1])
    straight = play(small, load(made(own), small), tokens, [CONTEXT, 1, MORE - 1])[:, CONTEXT:]
    torch.testing.assert_close(found, straight[beams], **TIGHT)
    cache.reset()
    again = play(small, cache, tokens, [CONTEXT, 1, MORE - 1])[:, CONTEXT:]
    torch.testing.assert_close(again, straight, **TIGHT)


@pytest.mark.parametrize("given", [{}, {"num_beams": 2}], ids=str)
def test_generation_goes_on_as_it_does_step_by_step(
    small: Any, given: dict[str, Any], draw: Any
) -> None:
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, **given}
    tokens = draw(2, CONTEXT)
    mask = {"attention_mask": torch.ones_like(tokens)}
    once, twice = (
        small.generate(tokens, **mask, **options, past_key_values=load(made("four-bits"), small))
        for _ in range(2)
    )
    assert torch.equal(once, twice)
    assert once.shape == (2, CONTEXT + 30)


def test_a_borrower_stores_nothing(model_of: Any, draw: Any, play: Any) -> None:
    model = model_of("llama", num_hidden_layers=4, head_dim=16).bfloat16()
    known = facts(model.config)
    for own in OWN:
        recipe = made(own)
        cache = load(recipe, model)
        play(model, cache, draw(1, 333), [333])
        found = weigh(recipe.policies(known), known, 333)
        assert found.bytes == cache.nbytes
        if own == "exact":
            assert found.ratio == 2
            assert found.payload_bits == 8


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (made(owner=2, borrowers="1", rest="rest"), "an owner comes before"),
        (made(owner=1, borrowers="1", rest="rest"), "an owner comes before"),
        (made(owner=1, borrowers="1-3"), "an owner comes before"),
        (made('select = { use = "attention" }\n'), "selects tokens"),
        (made('share = { use = "xkv" }\n'), "shares what it stores itself"),
    ],
    ids=str,
)
def test_what_cannot_be_an_owner_is_refused(small: Any, recipe: Recipe, why: str) -> None:
    with pytest.raises(UsageError, match=f"layer 1 cannot read the cache of layer .*: .*{why}"):
        recipe.policies(facts(small.config))


def test_a_chain_of_borrowers_is_refused(small: Any) -> None:
    recipe = recipes.loads(
        'kvtune = 1\n[[layers]]\nspan = "1"\nshare = { use = "owner", layer = 0 }\n'
        '[[layers]]\nspan = "2"\nshare = { use = "owner", layer = 1 }\n[[layers]]\nspan = "0, 3"\n'
    )
    with pytest.raises(UsageError, match="layer 2 cannot read the cache of layer 1"):
        recipe.policies(facts(small.config))


def test_a_sliding_owner_is_refused_and_a_sliding_borrower_left_alone(model_of: Any) -> None:
    model = model_of("gemma2", num_hidden_layers=4, layer_types=SLIDES)
    known = facts(model.config)
    with pytest.raises(UsageError, match="that is a sliding_attention layer"):
        made(owner=1, borrowers="2").policies(known)
    policies = made(owner=0, borrowers="1-3").policies(known)
    assert [policy.is_dense for policy in policies] == [True, True, False, True]


SLIDES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


def test_a_borrower_says_that_it_stores_nothing(small: Any) -> None:
    recipe = recipes.loads(
        'kvtune = 1\n[[layers]]\nspan = "1"\nrecent = 4\nshare = { use = "owner" }\n'
        '[[layers]]\nspan = "rest"\n'
    )
    with pytest.raises(UsageError, match="stores nothing"):
        recipe.policies(facts(small.config))


def test_an_owner_that_cannot_crop_keeps_its_borrowers_as_they_are(
    small: Any, play: Any, draw: Any
) -> None:
    cache = load(made("four-bits"), small)
    play(small, cache, draw(1, CONTEXT), [CONTEXT])
    with pytest.raises(UnsupportedError, match="Cannot crop 60"):
        cache.crop(-60)
    assert [layer.get_seq_length() for layer in cache.layers] == [CONTEXT] * 4
