"""Laws of layers that store together inside a model: reading, padding, generation, and the bank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvtune import recipe as recipes
from kvtune.bank import build
from kvtune.cache import load
from kvtune.errors import UnsupportedError
from kvtune.grouped import GroupedLayer
from kvtune.measure import Bench
from kvtune.models import facts
from kvtune.prove import by_generation
from kvtune.recipe import Recipe
from kvtune.sharing import groups, pieces

CONTEXT, MORE = 80, 64
TIGHT = {"atol": 1e-9, "rtol": 1e-9}
FOUR = '[{ use = "affine", bits = 4, group = "head" }]'
CODES = f"kept.keys = {FOUR}\nkept.values = {FOUR}\n"
BODIES = {
    "whole": "sinks = 2\nrecent = 9\n"
    'share = { use = "xkv", layers = 2, key_rank = 1.0, value_rank = 1.0 }\n',
    "ranks": f"sinks = 2\nrecent = 9\n{CODES}"
    'share = { use = "xkv", layers = 2, key_rank = 0.25, value_rank = 0.375, centre = true }\n',
    "merged": f'recent = 9\n{CODES}share = {{ use = "minicache", retained = 0.1 }}\n',
}


def made(body: str) -> Recipe:
    return recipes.loads(f'kvtune = 1\n[[layers]]\nspan = "all"\n{BODIES[body]}')


def cut(recipe: Recipe, model: Any, seen: int = CONTEXT, count: int = MORE) -> list[int]:
    return pieces(recipe.policies(facts(model.config)), seen, count)


@pytest.fixture(scope="module")
def small(model_of: Any) -> Any:
    """A Llama of two layers that store together and one that is left over."""
    return model_of("llama", num_hidden_layers=3, head_dim=16)


every_body = pytest.mark.parametrize("body", BODIES)
lossy = pytest.mark.parametrize("body", [name for name in BODIES if name != "whole"])


@pytest.mark.parametrize("centre", ["false", "true"])
def test_full_rank_is_the_plain_cache(
    name: str, model: Any, centre: str, play: Any, draw: Any
) -> None:
    """Of biases, QK-norms, odd head sizes, partial rotary embeddings, one kv head, and beside
    sliding layers."""
    body = BODIES["whole"].replace(" }", f", centre = {centre} }}")
    recipe = recipes.loads(f'kvtune = 1\n[[layers]]\nspan = "all"\n{body}')
    tokens, sizes = draw(2, 400), [340, 30, 1, 1, 28]  # the widest group has 256 channels
    cache = load(recipe, model)
    found = play(model, cache, tokens, sizes)
    plain = play(model, DynamicCache(config=model.config), tokens, sizes)
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=2e-5)
    held = [layer for layer in cache.layers if isinstance(layer, GroupedLayer)]
    assert len(held) == len(facts(model.config).compressible())
    for layer in held:
        rows = layer.groups[0].rows
        assert rows.keys.tokens == 384, "else nothing was stored"
        assert rows.keys._store.tokens == rows.keys.tokens, "nothing waits between forwards"


@lossy
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "phi3", "yi"])
def test_pieces_equal_steps_and_the_next_position_is_the_true_one(
    model: Any, body: str, play: Any, draw: Any
) -> None:
    recipe, tokens = made(body), draw(2, CONTEXT + MORE)
    caches = [load(recipe, model) for _ in range(2)]
    steps = play(model, caches[0], tokens, [CONTEXT, *[1] * MORE])
    found = play(model, caches[1], tokens, [CONTEXT, *cut(recipe, model)])
    torch.testing.assert_close(found, steps, **TIGHT)
    assert caches[0].get_seq_length() == CONTEXT + MORE
    plain = play(model, DynamicCache(config=model.config), tokens, [CONTEXT, MORE])
    assert (found - plain)[:, CONTEXT:].abs().max() > 1e-3, "else nothing was stored"


@every_body
def test_a_chunk_reads_exactly_what_leaves_the_window_within_it(
    small: Any, body: str, play: Any, draw: Any
) -> None:
    """Its first layers could read nothing else: the group's last layer has not seen it."""
    short = 40  # of which nothing has left the window
    recipe, tokens = made(body), draw(1, short + 300)
    found = play(small, load(recipe, small), tokens, [short, 300])
    plain = play(small, DynamicCache(config=small.config), tokens, [short, 300])
    torch.testing.assert_close(found, plain, **TIGHT)


@lossy
def test_a_second_prompt_is_stored_beside_the_first_on_the_same_basis(
    small: Any, body: str, play: Any, draw: Any
) -> None:
    recipe, tokens = made(body), draw(2, 330)
    cache = load(recipe, small)
    play(small, cache, tokens[:, :153], [120, *[1] * 33])
    stores = [
        cache.layers[0].groups[0].rows.keys._store,
        cache.layers[2].groups[0].rows.values._store,
    ]
    before = [(s.tokens, s._body._body.tensor.clone(), dict(s._learned)) for s in stores]
    play(small, cache, tokens[:, 153:], [100, 77])
    for store, (count, body_then, learned) in zip(stores, before, strict=True):
        assert store.tokens >= 256 > count == 128
        page = body_then.shape[2]
        assert torch.equal(store._body._body.tensor[:, :, :page], body_then)
        assert all(store._learned[key] is x for key, x in learned.items())


@every_body
@pytest.mark.parametrize("name", ["phi3", "gemma2"])
def test_a_padded_row_is_the_row_alone(model: Any, body: str, play: Any, draw: Any) -> None:
    recipe, pads = made(body), (0, 9, 60, 9)
    tokens, mask = draw(4, CONTEXT + MORE), torch.ones(4, CONTEXT + MORE, dtype=torch.long)
    for row, pad in enumerate(pads):
        tokens[row, :pad], mask[row, :pad] = 0, 0
    found = play(model, load(recipe, model), tokens, [CONTEXT, *[1] * MORE], mask)
    for row, pad in enumerate(pads):
        alone = play(
            model, load(recipe, model), tokens[row : row + 1, pad:], [CONTEXT - pad, *[1] * MORE]
        )
        torch.testing.assert_close(found[row, CONTEXT:], alone[0, CONTEXT - pad :], **TIGHT)


@every_body
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_bank_measurement_equals_generation(model: Any, body: str, draw: Any) -> None:
    policies = made(body).policies(facts(model.config))
    bank = build(model, draw(2, CONTEXT + MORE + 1), CONTEXT)
    bench = Bench(model, bank, load(made(body), model)._made_of[2])
    measured = bench.measure(policies)
    generated = by_generation(model, load(made(body), model), bank, MORE)
    went_on = by_generation(model, bench.cache(policies), bank, MORE)
    torch.testing.assert_close(went_on.kl, generated.kl, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(measured.kl, generated.kl, atol=1e-5, rtol=1e-3)
    assert torch.equal(measured.flips, generated.flips)
    assert torch.equal(bench.measure(policies).kl, measured.kl), "the memo is as it was"
    assert torch.equal(bench.measure(policies, memo=False).kl, measured.kl)
    half = bench.measure(policies, rows=range(1, 2))
    torch.testing.assert_close(half.kl[0], measured.kl[1], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    "given", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str
)
def test_full_rank_generates_what_a_plain_cache_does(
    small: Any, given: dict[str, Any], draw: Any
) -> None:
    tokens = draw(2, 100)
    options = {"max_new_tokens": 45, "do_sample": False, "pad_token_id": 0, **given}
    mask = {"attention_mask": torch.ones_like(tokens)}
    found = small.generate(tokens, **mask, **options, past_key_values=load(made("whole"), small))
    plain = small.generate(
        tokens, **mask, **options, past_key_values=DynamicCache(config=small.config)
    )
    assert torch.equal(found, plain)


@every_body
def test_beams_follow_their_rows(small: Any, body: str, play: Any, draw: Any) -> None:
    recipe, beams = made(body), torch.tensor([1, 1, 0, 2])
    pads = [0, 0, 5]
    tokens, mask = draw(3, CONTEXT + MORE), torch.ones(3, CONTEXT + MORE, dtype=torch.long)
    tokens[2, :5], mask[2, :5] = 0, 0
    cache = load(recipe, small)
    play(small, cache, tokens[:, :CONTEXT], [CONTEXT], mask)
    for _ in range(2):  # twice, as beams move in every step
        cache.reorder_cache(torch.tensor([2, 1, 0]))
    cache.reorder_cache(beams)
    found = play(small, cache, tokens[beams][:, CONTEXT:], [1] * MORE, mask[beams])
    straight = play(small, load(recipe, small), tokens, [CONTEXT, *[1] * MORE], mask)[:, CONTEXT:]
    torch.testing.assert_close(found, straight[beams], **TIGHT)
    assert [layer.groups[0].rows.keys._store for layer in cache.layers[:2]] in (
        [cache.layers[0].groups[0].rows.keys._store] * 2,
    )
    assert sorted(pad for group in cache.layers[0].groups for pad in group.pads) == sorted(
        pads[row] for row in beams.tolist()
    )


@every_body
def test_a_crop_within_the_window_forgets_and_more_is_refused(
    small: Any, body: str, play: Any, draw: Any
) -> None:
    recipe, tokens = made(body), draw(2, 150)
    cropped, straight = load(recipe, small), load(recipe, small)
    prompt = 110
    play(small, cropped, tokens[:, :prompt], [prompt])
    play(small, straight, tokens[:, :prompt], [prompt])
    play(small, cropped, draw(2, 3, seed=5), [1] * 3)
    cropped.crop(-3)
    more = [1] * 40
    found = play(small, cropped, tokens[:, prompt:], more)
    torch.testing.assert_close(found, play(small, straight, tokens[:, prompt:], more), **TIGHT)
    with pytest.raises(UnsupportedError, match="Cannot crop 60 tokens"):
        cropped.crop(-60)
    assert cropped.get_seq_length() == 150


@every_body
def test_what_is_reset_starts_anew(small: Any, body: str, play: Any, draw: Any) -> None:
    recipe, tokens = made(body), draw(2, 150)
    cache = load(recipe, small)
    expected = play(small, cache, tokens, [100, *[1] * 50])
    for clear in (cache.reset, lambda: [layer.reset() for layer in cache.layers]):
        clear()
        torch.testing.assert_close(play(small, cache, tokens, [100, *[1] * 50]), expected, **TIGHT)
    again = play(small, cache.fresh(), tokens, [100, *[1] * 50])
    torch.testing.assert_close(again, expected, **TIGHT)


def test_assisted_decoding_equals_plain_decoding(small: Any, model_of: Any, draw: Any) -> None:
    """It asks several tokens at once and crops those that the model would not have said."""
    tokens, helper = draw(1, 120), model_of("llama", seed=1, num_hidden_layers=1)
    recipe = recipes.loads(
        f'kvtune = 1\n[[layers]]\nspan = "all"\n{BODIES["ranks"]}'.replace("= 9", "= 39")
    )
    options = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    plain = small.generate(tokens, **options, past_key_values=load(recipe, small))
    found = small.generate(
        tokens, **options, past_key_values=load(recipe, small), assistant_model=helper
    )
    assert torch.equal(found, plain)


def test_sliding_layers_stay_apart_from_groups(model_of: Any) -> None:
    model = model_of(
        "gemma2",
        num_hidden_layers=6,
        layer_types=["full_attention", "sliding_attention", "full_attention"] * 2,
    )
    recipe, known = made("ranks"), facts(model.config)
    assert groups(recipe.policies(known), known.layers) == ((0, 2), (3, 5))
    cache = load(recipe, model)
    kinds = [isinstance(layer, GroupedLayer) for layer in cache.layers]
    assert kinds == [True, False, True] * 2
