"""Laws of the front door: what a recipe asks of a prompt is done, nothing else is stored, and a
plain forward of such a cache is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvtune import recipe as recipes
from kvtune.cache import CompressedCache, load
from kvtune.drafting import drafted, glanced
from kvtune.errors import UnsupportedError, UsageError
from kvtune.methods.specpc import Specpc
from kvtune.models import facts
from kvtune.prefill import Draft, prefill, read
from kvtune.replay import replayed
from kvtune.splits import gathered, parted

LENGTH, BUDGET = 60, 24
REPEAT = [5, 6]


class Words:
    """A tokenizer of 61 words, to which any text is one question."""

    def __init__(self, size: int = 61) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(place): place for place in range(self.size)}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": REPEAT}


WORDS = Words()


def selecting(select: str, span: str = "all", more: str = "") -> str:
    return f'[[layers]]\nspan = "{span}"\nsinks = 4\nrecent = 8\nselect = {select}\n{more}'


KVZIP = f'{{ use = "kvzip", budget = {BUDGET} }}'
DRAFT = f'{{ use = "draft", budget = {BUDGET}, window = 8, kernel = 3 }}'
SPECPC = 'prefill = { use = "specpc", budget = 30, window = 16, kernel = 16, skip = 2 }\n'
QUANTIZED = (
    '[[layers]]\nspan = "0"\nrecent = 8\n'
    'kept.keys = [{ use = "affine", bits = 8 }]\nkept.values = [{ use = "affine", bits = 8 }]\n'
)


def cache_of(model: Any, text: str) -> CompressedCache:
    return load(recipes.loads(f"kvtune = 1\n{text}"), model)


def go(model: Any, cache: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Returns what is said behind a prompt, and leaves the cache filled."""
    found = prefill(model, cache, tokens, tokenizer=WORDS, **options)
    return said(model, cache, found)


def said(model: Any, cache: Any, tokens: Tensor, count: int = 6) -> Tensor:
    made = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return made[:, tokens.shape[1] :]


def dense(model: Any, tokens: Tensor) -> Any:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    return cache


@pytest.mark.parametrize("select", [KVZIP, DRAFT], ids=["kvzip", "draft"])
def test_a_plain_forward_is_refused(llama: Any, draw: Any, select: str) -> None:
    cache = cache_of(llama, selecting(select))
    with pytest.raises(UnsupportedError, match=r"kvtune\.prefill\(model, cache, tokens"):
        said(llama, cache, draw(1, LENGTH))


def test_a_cache_that_wants_nothing_is_left_alone(llama: Any, draw: Any) -> None:
    tokens = draw(1, LENGTH)
    for cache in (DynamicCache(config=llama.config), cache_of(llama, QUANTIZED + REST)):
        assert prefill(llama, cache, tokens, tokenizer=WORDS) is tokens
        assert cache.get_seq_length() == 0


REST = '[[layers]]\nspan = "rest"\n'


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("use", ["kvzip", "draft"])
def test_where_every_token_stays_it_goes_on_as_a_dense_cache_does(
    model: Any, draw: Any, use: str
) -> None:
    tokens = draw(2, LENGTH)
    expected = said(model, DynamicCache(config=model.config), tokens)
    cache = cache_of(model, selecting(f'{{ use = "{use}", share = 1.0 }}'))
    assert torch.equal(go(model, cache, tokens, draft=Draft(model, WORDS)), expected)


def test_what_a_replay_looks_at_stays(llama: Any, draw: Any) -> None:
    tokens = draw(2, LENGTH)
    cache = cache_of(llama, selecting(KVZIP))
    prefill(llama, cache, tokens, tokenizer=WORDS)
    context = tokens[:, :-1]
    whole = dense(llama, context)
    held = {i: (whole.layers[i].keys, whole.layers[i].values) for i in range(4)}
    scores = replayed(llama, context, whole.layers, held, REPEAT)
    for layer, (keys, _) in held.items():
        end = LENGTH - 1 - 8
        places = parted(scores[layer][..., 4:end], BUDGET - 12)[0] + 4
        wanted = torch.cat([keys[:, :, :4], gathered(keys, places), keys[:, :, end:]], 2)
        torch.testing.assert_close(cache.layers[layer].prompt()[0], wanted)


def test_what_a_draft_looks_at_stays_and_the_draft_does_not(llama: Any, draw: Any) -> None:
    tokens = draw(1, LENGTH)
    cache = cache_of(llama, selecting(DRAFT))
    found = prefill(llama, cache, tokens, tokenizer=WORDS, draft=Draft(llama, WORDS), ahead=5)
    assert found is tokens
    assert cache.get_seq_length() == LENGTH - 1
    llama.set_attn_implementation("eager")
    ahead = drafted(llama, tokens, 5)
    with torch.no_grad():
        out = llama(torch.cat([tokens, ahead], 1), output_attentions=True)
    keys = dense(llama, tokens[:, :-1]).layers
    end = LENGTH - 1 - 8
    for layer, weights in enumerate(out.attentions):
        rows = weights[:, :, end:].unflatten(1, (2, 2))[..., 4:end].amax((2, 3))
        pooled = torch.nn.functional.max_pool1d(rows, 3, 1, 1)
        places = parted(pooled, BUDGET - 12)[0] + 4
        own = keys[layer].keys
        wanted = torch.cat([own[:, :, :4], gathered(own, places), own[:, :, end:]], 2)
        held = cache.layers[layer].prompt()[0]
        torch.testing.assert_close(held, wanted, rtol=1e-4, atol=1e-4)  # softmax in 32 bits


@pytest.mark.parametrize("select", [KVZIP, DRAFT], ids=["kvzip", "draft"])
def test_layers_that_select_nothing_store_the_prompt_as_always(
    llama: Any, draw: Any, select: str
) -> None:
    tokens = draw(1, LENGTH)
    body = QUANTIZED + '[[layers]]\nspan = "1"\n' + selecting(select, "rest")
    cache = cache_of(llama, body)
    prefill(llama, cache, tokens, tokenizer=WORDS, draft=Draft(llama, WORDS))
    plain = cache_of(llama, QUANTIZED + REST)
    with torch.no_grad():
        llama(tokens[:, :-1], past_key_values=plain)
    torch.testing.assert_close(cache.layers[0].prompt(), plain.layers[0].prompt())
    torch.testing.assert_close(cache.layers[1].keys, plain.layers[1].keys)
    assert [layer.get_seq_length() for layer in cache.layers] == [LENGTH - 1] * 4
    assert said(llama, cache, tokens).shape == (1, 6)


def test_a_selector_that_needs_no_replay_decides_as_without_one(llama: Any, draw: Any) -> None:
    tokens = draw(1, LENGTH)
    other = '{ use = "attention", budget = 24 }'
    cache = cache_of(llama, selecting(other, "0") + selecting(KVZIP, "rest"))
    prefill(llama, cache, tokens, tokenizer=WORDS)
    plain = cache_of(llama, selecting(other))
    with torch.no_grad():
        llama(tokens[:, :-1], past_key_values=plain)
    torch.testing.assert_close(cache.layers[0].prompt(), plain.layers[0].prompt())


def test_heads_of_a_layer_may_want_different_things(llama: Any, draw: Any) -> None:
    tokens = draw(1, LENGTH)
    other = f'{{ use = "attention", budget = {BUDGET} }}'
    body = selecting(KVZIP, more=f'heads = [{{ span = "0", select = {other} }}]\n')
    mixed, whole, plain = (
        cache_of(llama, text) for text in (body, selecting(KVZIP), selecting(other))
    )
    for cache in (mixed, whole):
        prefill(llama, cache, tokens, tokenizer=WORDS)
    with torch.no_grad():
        llama(tokens[:, :-1], past_key_values=plain)
    keys, values = mixed.layers[2].prompt()
    for head, cache in enumerate((plain, whole)):
        torch.testing.assert_close(keys[:, head], cache.layers[2].prompt()[0][:, head])
        torch.testing.assert_close(values[:, head], cache.layers[2].prompt()[1][:, head])


def test_tokens_of_a_kind_go_before_all_others(llama: Any, draw: Any) -> None:
    tokens = draw(1, LENGTH)
    kinds = torch.zeros(1, LENGTH, dtype=torch.bool).index_fill(1, torch.arange(20, 32), True)
    cache = cache_of(llama, selecting(f'{{ use = "text_prior", budget = {BUDGET} }}'))
    prefill(llama, cache, tokens, tokenizer=WORDS, kinds=kinds)
    keys = dense(llama, tokens[:, :-1]).layers[1].keys
    torch.testing.assert_close(cache.layers[1].prompt()[0][:, :, 4:-8], keys[:, :, 20:32])
    assert cache.shared.kinds is None, "the next prompt has kinds of its own"


def test_a_cut_prompt_is_a_prompt_of_its_own(llama: Any, draw: Any) -> None:
    tokens = draw(1, LENGTH)
    cache = cache_of(llama, SPECPC + QUANTIZED + REST)
    found = prefill(llama, cache, tokens, tokenizer=WORDS, draft=Draft(llama, WORDS))
    score = glanced(llama, tokens, drafted(llama, tokens, 1), 16, 2)
    part = Specpc(budget=30, window=16, kernel=16, skip=2)
    assert torch.equal(found, tokens[:, part.keep(score)])
    plain = cache_of(llama, QUANTIZED + REST)
    assert torch.equal(said(llama, cache, found), said(llama, plain, found))


def test_a_cut_prompt_may_be_looked_at_as_well(llama: Any, draw: Any) -> None:
    cache = cache_of(llama, SPECPC + selecting(DRAFT))
    draft = Draft(llama, WORDS)
    found = prefill(llama, cache, draw(2, LENGTH), tokenizer=WORDS, draft=draft)
    assert found.shape == (2, 30)
    assert cache.get_seq_length() == 29
    assert cache.layers[0].prompt()[0].shape[2] == BUDGET


def test_a_context_is_read_whole(llama: Any, draw: Any) -> None:
    tokens = draw(1, LENGTH)
    draft = Draft(llama, WORDS)
    for body, held in ((selecting(KVZIP), LENGTH), (SPECPC + selecting(DRAFT), 30)):
        cache = cache_of(llama, body)
        found = read(llama, cache, tokens, tokenizer=WORDS, draft=draft)
        assert found.shape[1] == held == cache.get_seq_length()


def test_a_cache_is_as_new_after_a_reset(llama: Any, draw: Any) -> None:
    cache = cache_of(llama, selecting(KVZIP))
    first = go(llama, cache, draw(1, LENGTH))
    cache.reset()
    assert torch.equal(go(llama, cache, draw(1, LENGTH)), first)


@pytest.mark.parametrize(
    ("body", "options", "told"),
    [
        (selecting(DRAFT), {}, "looks ahead with a draft model, and none is given"),
        (SPECPC + REST, {}, "cuts a prompt by what it sees of a draft model, and none"),
    ],
    ids=["ahead", "cut"],
)
def test_a_draft_that_is_missing_is_asked_for(
    llama: Any, draw: Any, body: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=f"{told}.*Give --draft"):
        prefill(llama, cache_of(llama, body), draw(1, LENGTH), tokenizer=WORDS, **options)


def test_what_does_not_go_together_is_refused(llama: Any, model_of: Any, draw: Any) -> None:
    tokens, draft = draw(1, LENGTH), Draft(llama, WORDS)
    both = cache_of(llama, selecting(DRAFT, "0") + selecting(KVZIP, "rest"))
    with pytest.raises(UnsupportedError, match="need a replay looks at no draft"):
        prefill(llama, both, tokens, tokenizer=WORDS, draft=draft)
    body = selecting(KVZIP, "0") + REST + '[[layers]]\nspan = "3"\nshare = { use = "owner", '
    lent = cache_of(llama, body + "layer = 2 }\n")
    with pytest.raises(UnsupportedError, match="read another's cache"):
        prefill(llama, lent, tokens, tokenizer=WORDS)
    used = cache_of(llama, selecting(KVZIP))
    go(llama, used, tokens)
    with pytest.raises(UsageError, match="holds a prompt already"):
        prefill(llama, used, tokens, tokenizer=WORDS)
    with pytest.raises(UsageError, match="one token leaves nothing to select"):
        prefill(llama, used.fresh(), tokens[:, :1], tokenizer=WORDS)
    with pytest.raises(UsageError, match="a draft with another tokenizer"):
        other = Draft(llama, Words(60))
        prefill(llama, cache_of(llama, selecting(DRAFT)), tokens, tokenizer=WORDS, draft=other)


def test_a_prompt_that_fills_all_positions_is_refused(model_of: Any, draw: Any) -> None:
    short = model_of("llama", max_position_embeddings=64)
    assert facts(short.config).max_positions == 64
    long = model_of("llama")
    cache = cache_of(short, selecting(DRAFT))
    with pytest.raises(UsageError, match=r"59 tokens of prompt and 33 behind it exceed .* 64"):
        prefill(short, cache, draw(1, LENGTH), tokenizer=WORDS, draft=Draft(long, WORDS))
    with pytest.raises(UsageError, match="32 that are drafted exceed the draft's 64"):
        draft = Draft(short, WORDS)
        prefill(
            long, cache_of(long, selecting(DRAFT)), draw(1, LENGTH), tokenizer=WORDS, draft=draft
        )
