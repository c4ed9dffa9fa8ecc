"""Laws of layers that select tokens, under every selector found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvtune_kernels import say_once
from torch import Tensor

from kvtune import parts
from kvtune import recipe as recipes
from kvtune.bank import build, wanted
from kvtune.cache import load, weigh
from kvtune.errors import UsageError
from kvtune.measure import Bench
from kvtune.models import facts
from kvtune.prove import by_generation
from kvtune.recipe import Recipe
from kvtune.retention import Selector
from kvtune.splits import gathered

CONTEXT, MORE = 150, 100
TIGHT = {"atol": 1e-9, "rtol": 1e-9}
# those that any generation feeds; the others have laws beside what feeds them
FED = {"attention", "queries", "positions", "output", "rope", "kinds"}
KINDS = {name: parts.find(name) for name in parts.names()}
SELECTORS = [
    name
    for name, kind in KINDS.items()
    if issubclass(kind, Selector) and kind.needs <= FED and not kind.fits
]
IN_CACHE = [name for name in SELECTORS if KINDS[name]().in_cache]
every_selector = pytest.mark.parametrize("name", [n for n in SELECTORS if n not in IN_CACHE])
PACKED = '[{ use = "affine", bits = 4, group = 32, axis = "channel" }]'
BODIES = {
    "budget": "budget = 64, every = 16 }\nsinks = 2\nrecent = 12",
    "share": "share = 0.25 }\nsinks = 2\nrecent = 12",
    "packed": f"budget = 112 }}\nsinks = 4\nrecent = 8\nkept.keys = {PACKED}",
}


def made(name: str, body: str = "budget") -> Recipe:
    select = f'select = {{ use = "{name}", {BODIES[body]}\n'
    return recipes.loads(f'kvtune = 1\n[[layers]]\nspan = "all"\n{select}')


@every_selector
def test_a_budget_of_all_tokens_is_bit_identical_to_no_selector(
    llama: Any, name: str, play: Any, draw: Any
) -> None:
    tokens, sizes = draw(2, CONTEXT + 20), [CONTEXT, *[1] * 20]
    text = 'kvtune = 1\n[[layers]]\nspan = "all"\nsinks = 2\nrecent = 12\n'
    codes = f"kept.keys = {PACKED}\n"
    plain = play(llama, load(recipes.loads(text + codes), llama), tokens, sizes)
    for much in ("budget = 400", "share = 1.0"):
        whole = recipes.loads(f'{text}select = {{ use = "{name}", {much} }}\n{codes}')
        assert torch.equal(play(llama, load(whole, llama), tokens, sizes), plain)


@pytest.mark.parametrize("body", BODIES)
@every_selector
def test_chunks_equal_steps_and_lengths_are_within_the_budget(
    llama: Any, name: str, body: str, play: Any, draw: Any
) -> None:
    tokens, caches = draw(2, CONTEXT + MORE), [load(made(name, body), llama) for _ in range(2)]
    steps = play(llama, caches[0], tokens, [CONTEXT, *[1] * MORE])
    chunks = play(llama, caches[1], tokens, [CONTEXT, 7, 80, MORE - 87])
    torch.testing.assert_close(chunks, steps, **TIGHT)
    assert caches[0].get_seq_length() == CONTEXT + MORE, "the next position is the true one"
    policy = caches[0].layers[0].policy
    if policy.renews:
        for layer in caches[0].layers:
            held = layer.groups[0].rows.read(torch.float64)[0].shape[2]
            assert held < policy.select.budget + policy.block


@every_selector
def test_sinks_and_window_stay_and_all_that_stays_is_what_was(llama: Any, name: str) -> None:
    given = torch.randn(3, 2, 4, CONTEXT, 64, generator=torch.Generator().manual_seed(0)).double()
    query, (keys, values) = given[0], given[1:, :, :2]
    layer = load(made(name), llama).layers[0]
    layer.update(keys, values)
    layer.attend(query, None, None, None)
    held = layer.groups[0].rows.read(torch.float64)
    assert held[0].shape[2] == 64
    for side, x in zip(held, (keys, values), strict=True):
        assert torch.equal(side[:, :, :2], x[:, :, :2])
        assert torch.equal(side[:, :, -12:], x[:, :, -12:])
    places = found(held[0], keys)
    assert torch.equal(gathered(values, places), held[1]), "keys and values of the same tokens"


def found(held: Tensor, keys: Tensor) -> Tensor:
    """Where each held key [B, H, n, D] stood among all of them [B, H, T, D]."""
    same = (held[:, :, :, None] == keys[:, :, None]).all(-1)
    assert (same.sum(-1) == 1).all(), "each is one of them"
    return same.int().argmax(-1)


@every_selector
def test_what_is_dropped_is_attention_masked_with_minus_infinity(llama: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(3, 2, 4, CONTEXT + 1, 64, generator=generator).double()
    query, (keys, values) = given[0], given[1:, :, :2]
    layer = load(made(name), llama).layers[0]
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    layer.attend(query[:, :, :-1], None, None, None)
    stay = found(layer.groups[0].rows.read(torch.float64)[0], keys[:, :, :-1])
    layer.update(keys[:, :, -1:], values[:, :, -1:])
    out = layer.attend(query[:, :, -1:], None, None, None)
    mask = torch.full(keys.shape[:3], float("-inf"), dtype=torch.float64).scatter(2, stay, 0.0)
    mask[:, :, -1] = 0.0
    k, v, bias = (x.repeat_interleave(2, 1) for x in (keys, values, mask))
    logits = query[:, :, -1:] @ k.transpose(2, 3) * 64**-0.5 + bias[:, :, None]
    torch.testing.assert_close(out, logits.softmax(-1) @ v, **TIGHT)


@every_selector
def test_a_padded_row_is_the_row_alone(llama: Any, name: str, play: Any, draw: Any) -> None:
    tokens, mask = draw(2, CONTEXT + 60), torch.ones(2, CONTEXT + 60, dtype=torch.long)
    tokens[1, :40], mask[1, :40] = 0, 0
    whole = play(llama, load(made(name), llama), tokens, [CONTEXT, 20, 40], mask)
    alone = play(llama, load(made(name), llama), tokens[1:, 40:], [CONTEXT - 40, 20, 40])
    torch.testing.assert_close(whole[1, CONTEXT:], alone[0, CONTEXT - 40 :], **TIGHT)


@pytest.mark.parametrize("body", ["budget", "share"])
@every_selector
def test_bank_measurement_equals_generation(llama: Any, name: str, body: str, draw: Any) -> None:
    recipe = made(name, body)
    policies = recipe.policies(facts(llama.config))
    bank = build(llama, draw(2, CONTEXT + 31), CONTEXT, **wanted(policies))
    bench = Bench(llama, bank, load(recipe, llama)._made_of[2])
    generated = by_generation(llama, load(recipe, llama), bank, 30)
    torch.testing.assert_close(bench.measure(policies).kl, generated.kl, atol=1e-5, rtol=1e-3)


@every_selector
def test_the_bytes_foretold_are_those_held(llama: Any, name: str, play: Any, draw: Any) -> None:
    known = facts(llama.config)
    for body in BODIES:
        recipe = made(name, body)
        cache = load(recipe, llama)
        play(llama, cache, draw(1, CONTEXT), [CONTEXT])
        held = sum(layer.nbytes for layer in cache.layers)
        wide = 4 * weigh(recipe.policies(known), known, CONTEXT).bytes  # float64 is not 16 bits
        assert held <= wide
        rows = cache.layers[0].groups[0].rows
        assert sum(rows.nbytes) == cache.layers[0].nbytes


@every_selector
def test_beams_follow_their_rows(llama: Any, name: str, play: Any, draw: Any) -> None:
    tokens, more = draw(3, CONTEXT), draw(3, 40, seed=1)
    cache, index = load(made(name), llama), torch.tensor([2, 0, 2])
    play(llama, cache, tokens, [CONTEXT])
    cache.batch_select_indices(index)
    again = load(made(name), llama)
    play(llama, again, tokens[index], [CONTEXT])
    found = play(llama, cache, more, [40])
    torch.testing.assert_close(found, play(llama, again, more, [40]), **TIGHT)


def test_keys_before_rope_and_heads_together_may_follow_a_selection(
    llama: Any, play: Any, draw: Any
) -> None:
    """The turn alone changes nothing, though tokens stand at positions of their own."""
    tokens, sizes = draw(2, CONTEXT + 60), [CONTEXT, *[1] * 60]
    for alike in ("true", "false"):
        for body in ("budget = 64", "share = 0.25"):
            select = f'select = {{ use = "attention", {body}, alike = {alike} }}\n'
            text = f'kvtune = 1\n[[layers]]\nspan = "all"\nsinks = 2\nrecent = 12\n{select}'
            turned = recipes.loads(f'{text}kept.keys = [{{ use = "derope" }}]\n')
            plain = play(llama, load(recipes.loads(text), llama), tokens, sizes)
            found = play(llama, load(turned, llama), tokens, sizes)
            torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-6)


REFUSED = {
    "no-room": ("budget = 20 }\nsinks = 4\nrecent = 16", "leaves no room beside sinks 4"),
    "both": ("budget = 64, share = 0.5 }", "a share, or a budget in tokens, not both"),
    "joint": (
        'budget = 64 }\nkept.keys = [{ use = "svd", rank = 0.5 }]',
        "stores heads together",
    ),
    "coded-rest": (
        f"budget = 64 }}\nkept.values = {PACKED.replace('channel', 'token')}\nrest.keys = []",
        "never decoded",
    ),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_what_does_not_go_together_is_refused_in_words(llama: Any, refused: str) -> None:
    body, said = REFUSED[refused]
    with pytest.raises((UsageError, recipes.IntegrityError), match=said):
        text = f'select = {{ use = "attention", {body}\n'
        recipes.loads(f'kvtune = 1\n[[layers]]\nspan = "all"\n{text}').policies(facts(llama.config))


def test_a_prompt_no_longer_than_the_window_is_kept_whole_and_said_once(
    llama: Any, play: Any, draw: Any
) -> None:
    say_once.cache_clear()
    cache = load(made("snapkv"), llama)
    with pytest.warns(UserWarning, match="kept whole: nothing is selected") as told:
        play(llama, cache, draw(1, 10), [10])
    assert len(told) == 1, "of all layers one says so"
    assert cache.layers[0].groups[0].rows.moved == 0


def test_a_bank_of_sums_is_not_taken_for_one_of_a_replay(llama: Any, draw: Any) -> None:
    policies = made("kvzip").policies(facts(llama.config))
    bank = build(llama, draw(1, CONTEXT + 11), CONTEXT, needs=frozenset({"attention"}))
    with pytest.raises(UsageError, match="selects tokens by a replay"):
        Bench(llama, bank).measure(policies)
