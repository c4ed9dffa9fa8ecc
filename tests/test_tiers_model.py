"""Laws of layers that select tokens inside a model: padding, generation, the bank, and bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvtune import recipe as recipes
from kvtune.bank import build, wanted
from kvtune.cache import load, weigh
from kvtune.errors import UsageError
from kvtune.measure import Bench
from kvtune.models import facts
from kvtune.prices import price, pulls
from kvtune.prove import by_generation
from kvtune.recipe import Recipe

NAMES = ("llama", "qwen2", "gemma2", "gemma3", "phi3")
CONTEXT, MORE = 150, 90
TIGHT = {"atol": 1e-9, "rtol": 1e-9}
TWO = '[{ use = "affine", bits = 2, group = "head" }]'
SELECT = 'select = { use = "attention", share = 0.25 }\n'
BODIES = {
    "dropped": f"sinks = 2\nrecent = 20\n{SELECT}",
    "two-bits": f"recent = 20\n{SELECT}rest.keys = {TWO}\nrest.values = {TWO}\n",
    "lossless": f"recent = 5\n{SELECT}rest = {{}}\n",
}


def made(body: str) -> Recipe:
    return recipes.loads(f'kvtune = 1\n[[layers]]\nspan = "all"\n{BODIES[body]}')


every_body = pytest.mark.parametrize("body", BODIES)


@every_body
@pytest.mark.parametrize("name", NAMES)
def test_chunks_equal_steps_and_the_next_position_is_the_true_one(
    model: Any, body: str, play: Any, draw: Any
) -> None:
    tokens, caches = draw(2, CONTEXT + MORE), [load(made(body), model) for _ in range(2)]
    steps = play(model, caches[0], tokens, [CONTEXT, *[1] * MORE])
    chunks = play(model, caches[1], tokens, [CONTEXT, 7, 80, MORE - 87])
    torch.testing.assert_close(chunks, steps, **TIGHT)
    assert caches[0].get_seq_length() == CONTEXT + MORE


@every_body
def test_a_padded_row_is_the_row_alone(llama: Any, body: str, play: Any, draw: Any) -> None:
    tokens, mask = draw(3, CONTEXT + MORE), torch.ones(3, CONTEXT + MORE, dtype=torch.long)
    for row, pad in enumerate((0, 9, 40)):
        tokens[row, :pad], mask[row, :pad] = 0, 0
    sizes = [CONTEXT, 1, 1, 50, MORE - 52]
    found = play(llama, load(made(body), llama), tokens, sizes, mask)
    for row, pad in enumerate((0, 9, 40)):
        alone = play(
            llama, load(made(body), llama), tokens[row : row + 1, pad:], [CONTEXT - pad, *sizes[1:]]
        )
        torch.testing.assert_close(found[row, CONTEXT:], alone[0, CONTEXT - pad :], **TIGHT)


@every_body
@pytest.mark.parametrize("name", NAMES)
def test_bank_measurement_equals_generation(model: Any, body: str, draw: Any) -> None:
    policies = made(body).policies(facts(model.config))
    bench = Bench(model, build(model, draw(2, CONTEXT + MORE + 1), CONTEXT, **wanted(policies)))
    measured = bench.measure(policies)
    generated = by_generation(model, load(made(body), model), bench.bank, MORE)
    went_on = by_generation(model, bench.cache(policies), bench.bank, MORE)
    torch.testing.assert_close(went_on.kl, generated.kl, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(measured.kl, generated.kl, atol=1e-5, rtol=1e-3)
    assert torch.equal(measured.flips, generated.flips)
    assert torch.equal(bench.measure(policies).kl, measured.kl), "the memo is as it was"
    assert torch.equal(bench.measure(policies, memo=False).kl, measured.kl)
    assert (float(measured.kl.mean()) < 1e-6) == (body == "lossless")


def test_a_price_is_higher_for_what_is_dropped_than_for_what_is_kept(llama: Any, draw: Any) -> None:
    bank = build(llama, draw(2, CONTEXT + MORE + 1), CONTEXT, needs=frozenset({"attention"}))
    bench, pull = Bench(llama, bank), pulls(llama, bank, 0)[0]
    dropped, lossless = (
        float(price(bench, 0, made(body).policies(facts(llama.config))[0], pull)[0])
        for body in ("dropped", "lossless")
    )
    assert lossless < 1e-12 < dropped


def test_a_bank_without_attention_says_what_it_lacks(llama: Any, draw: Any) -> None:
    bench = Bench(llama, build(llama, draw(1, CONTEXT + 9), CONTEXT))
    assert bench.bank.attention == {}
    with pytest.raises(UsageError, match="this bank did not sum up"):
        bench.measure(made("dropped").policies(facts(llama.config)))


@pytest.mark.parametrize(
    "given", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str
)
def test_a_lossless_split_generates_what_a_plain_cache_does(
    llama: Any, given: dict[str, Any], draw: Any
) -> None:
    tokens = draw(2, CONTEXT)
    options = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0, **given}
    mask = {"attention_mask": torch.ones_like(tokens)}
    found = llama.generate(tokens, **mask, **options, past_key_values=load(made("lossless"), llama))
    plain = llama.generate(
        tokens, **mask, **options, past_key_values=DynamicCache(config=llama.config)
    )
    assert torch.equal(found, plain)


@pytest.mark.parametrize("body", ["dropped", "two-bits"])
def test_beams_follow_their_rows(llama: Any, body: str, play: Any, draw: Any) -> None:
    tokens, beams = draw(3, CONTEXT + MORE), torch.tensor([1, 1, 0])
    cache = load(made(body), llama)
    play(llama, cache, tokens[:, :CONTEXT], [CONTEXT])
    cache.reorder_cache(beams)
    found = play(llama, cache, tokens[beams][:, CONTEXT:], [1, MORE - 1])
    straight = play(llama, load(made(body), llama), tokens, [CONTEXT, 1, MORE - 1])[:, CONTEXT:]
    torch.testing.assert_close(found, straight[beams], **TIGHT)


@every_body
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_foretold_bytes_are_those_held(
    model_of: Any, name: str, body: str, draw: Any, play: Any
) -> None:
    model = model_of(name).bfloat16()
    cache = load(made(body), model)
    play(model, cache, draw(1, 333), [333])
    assert (
        weigh(made(body).policies(facts(model.config)), facts(model.config), 333).bytes
        == cache.nbytes
    )
