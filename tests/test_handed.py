"""Laws of models that hand a layer's keys and values on to others by themselves (Gemma 3n, 4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvtune import recipe as recipes
from kvtune.bank import build
from kvtune.cache import load, weigh
from kvtune.errors import UsageError
from kvtune.lent import LendingLayer
from kvtune.measure import Bench
from kvtune.models import facts
from kvtune.prove import by_generation
from kvtune.recipe import Recipe

TIGHT = {"atol": 1e-9, "rtol": 1e-9}
CONTEXT, MORE = 90, 60
FOUR = '[{ use = "affine", bits = 4, group = "head" }]'
BODIES = {
    "dense": "",
    "affine": f"sinks = 2\nrecent = 5\nkept.keys = {FOUR}\nkept.values = {FOUR}\n",
    "derope": f'recent = 5\nkept.keys = [{{ use = "derope" }}, {FOUR[1:]}\n',
    "xkv": 'recent = 5\nshare = { use = "xkv", layers = 2, key_rank = 0.25, value_rank = 0.375 }\n',
}
every_body = pytest.mark.parametrize("body", BODIES)


def made(body: str) -> Recipe:
    return recipes.loads(f'kvtune = 1\n[[layers]]\nspan = "all"\n{BODIES.get(body, body)}')


@pytest.fixture(params=["gemma3n", "gemma4"])
def handing(request: pytest.FixtureRequest, model_of: Any) -> Any:
    return model_of(request.param)


def test_facts_say_who_is_handed_what(handing: Any) -> None:
    known = facts(handing.config)
    assert [layer.reads for layer in known.layers] == [None, None, None, 1, 2]
    assert known.compressible() == (0, 2)
    assert known.handed(2) == 1
    assert known.handed(0) == 0


@every_body
def test_what_is_handed_on_is_read_as_its_owner_reads_it(
    handing: Any, body: str, play: Any, draw: Any
) -> None:
    tokens, caches = draw(2, CONTEXT + MORE), [load(made(body), handing) for _ in range(2)]
    steps = play(handing, caches[0], tokens, [CONTEXT, *[1] * MORE])
    chunks = [3, 31, 1, MORE - 35] if body != "xkv" else [1] * MORE
    found = play(handing, caches[1], tokens, [CONTEXT, *chunks])
    torch.testing.assert_close(found, steps, **TIGHT)
    plain = play(handing, DynamicCache(config=handing.config), tokens, [CONTEXT, MORE])
    torch.testing.assert_close(steps[:, :CONTEXT], plain[:, :CONTEXT], **TIGHT)
    far = (steps - plain)[:, CONTEXT:].abs().max()
    assert (far < 1e-5) == (body == "dense")
    assert caches[0].get_seq_length() == CONTEXT + MORE


def test_a_layer_is_read_from_its_pages_by_those_that_it_is_handed_to(
    handing: Any, play: Any, draw: Any, monkeypatch: Any
) -> None:
    cache, tokens = load(made("affine"), handing), draw(1, CONTEXT + 1)
    play(handing, cache, tokens[:, :CONTEXT], [CONTEXT])
    assert isinstance(cache.layers[2], LendingLayer)
    rows, asked = cache.layers[2].groups[0].rows, []
    own = rows.answer
    monkeypatch.setattr(
        rows, "answer", lambda *given: asked.append(rows.keys.tokens) or own(*given)
    )
    play(handing, cache, tokens[:, CONTEXT:], [1])
    assert asked == [64, 64]


@pytest.mark.parametrize("body", ["affine", "xkv"])
def test_bank_measurement_equals_generation(handing: Any, body: str, draw: Any) -> None:
    recipe = made(body)
    bank = build(handing, draw(2, CONTEXT + MORE + 1), CONTEXT)
    bench = Bench(handing, bank, load(made("derope"), handing)._made_of[2])
    policies = recipe.policies(facts(handing.config))
    measured = bench.measure(policies)
    generated = by_generation(handing, load(recipe, handing), bank, MORE)
    torch.testing.assert_close(measured.kl, generated.kl, atol=1e-5, rtol=1e-3)
    assert torch.equal(bench.measure(policies).kl, measured.kl)


@every_body
def test_foretold_bytes_are_those_held(handing: Any, body: str, model_of: Any, draw: Any) -> None:
    name = "gemma4" if "Gemma4" in type(handing).__name__ else "gemma3n"
    model = model_of(name, sliding_window=4096).bfloat16()
    cache = load(made(body), model)
    with torch.no_grad():
        model(draw(1, 300), past_key_values=cache)
    known = facts(model.config)
    assert weigh(made(body).policies(known), known, 300).bytes == cache.nbytes


def test_beams_go_on(handing: Any, draw: Any) -> None:
    tokens = draw(2, CONTEXT)
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    given = {"attention_mask": torch.ones_like(tokens), **options}
    plain = handing.generate(tokens, **given, past_key_values=DynamicCache(config=handing.config))
    found = handing.generate(tokens, **given, past_key_values=load(made("dense"), handing))
    assert torch.equal(found, plain)
    assert handing.generate(tokens, **given, past_key_values=load(made("affine"), handing)).shape


def test_tokens_are_not_selected_where_a_layer_is_handed_on(handing: Any) -> None:
    recipe = made('select = { use = "attention" }\n')
    with pytest.raises(UsageError, match="layer 2 is handed on to other layers"):
        recipe.policies(facts(handing.config))
