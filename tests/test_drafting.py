"""Laws of drafting: what a draft says and looks at, and which drafts are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvtune.attention import NAME
from kvtune.drafting import drafted, glanced, same_tokenizer
from kvtune.errors import UsageError
from kvtune.shortening import peak, row_weights
from kvtune.watched import Sight, going_on


class Words:
    """A tokenizer of whole words."""

    def __init__(self, *words: str) -> None:
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self._words)}


def test_tokenizers_of_one_vocabulary_are_the_same() -> None:
    same_tokenizer(Words("a", "b"), Words("a", "b"))


@pytest.mark.parametrize("other", [("a", "c"), ("b", "a"), ("a",)])
def test_a_draft_with_another_tokenizer_is_refused(other: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"a draft with another tokenizer: '[abc]' .* one of \d"):
        same_tokenizer(Words("a", "b"), Words(*other))


def test_a_draft_says_what_is_likeliest_step_by_step(llama: Any, draw: Any) -> None:
    tokens = draw(2, 20)
    said = drafted(llama, tokens, 4)
    whole = torch.cat([tokens, said], 1)
    with torch.no_grad():
        likeliest = llama(whole[:, :-1]).logits.argmax(-1)
    assert torch.equal(said, likeliest[:, 19:])


def test_a_text_that_ends_is_drafted_no_further(llama: Any, draw: Any) -> None:
    tokens = draw(1, 20)
    said = drafted(llama, tokens, 4)
    own = llama.generation_config
    before, own.eos_token_id = own.eos_token_id, int(said[0, 1])
    try:
        assert torch.equal(drafted(llama, tokens, 4), said[:, :2])
    finally:
        own.eos_token_id = before


@pytest.mark.parametrize("skip", [0, 2, 3])
@pytest.mark.parametrize("ahead", [0, 3])
def test_a_glance_is_the_peak_over_the_rows_of_all_layers_but_the_first(
    llama: Any, draw: Any, skip: int, ahead: int
) -> None:
    tokens, more = draw(1, 30), draw(1, 3, seed=1)[:, :ahead]
    found = glanced(llama, tokens, more, 8, skip)
    sights: dict[int, Sight] = {}
    llama.set_attn_implementation(NAME)
    layers = DynamicCache(config=llama.config).layers
    none = {i: (torch.empty(1, 2, 0, 64).double(),) * 2 for i in range(4)}
    whole = torch.cat([tokens, more], 1)
    with torch.no_grad():
        llama(whole, past_key_values=going_on(layers, none, sights.__setitem__))
    best = torch.zeros(30)
    for layer in range(skip, 4):
        keys = sights[layer].keys.repeat_interleave(2, 1)[0]
        logits = sights[layer].query[0] @ keys.transpose(-1, -2) / 8
        ones = torch.ones(30 + ahead, 30 + ahead, dtype=torch.bool)
        weights = logits.masked_fill(ones.triu(1), float("-inf")).softmax(-1)
        rows = weights[:, 30 - 8 :, :30]
        best = best.maximum(peak(rows, row_weights(8, ahead)).float())
    torch.testing.assert_close(found, best)


def test_a_window_longer_than_the_prompt_is_all_but_its_first_token(llama: Any, draw: Any) -> None:
    tokens = draw(1, 10)
    none = tokens[:, :0]
    assert torch.equal(glanced(llama, tokens, none, 64, 0), glanced(llama, tokens, none, 9, 0))


def test_a_draft_without_a_layer_to_ask_is_refused(llama: Any, draw: Any) -> None:
    with pytest.raises(UsageError, match="first 8 layers of the draft are skipped, and it has 4"):
        glanced(llama, draw(1, 10), draw(1, 0), 4, 8)
