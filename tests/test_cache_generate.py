"""Laws of `model.generate()`: every decoding mode works on a compressed cache, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, set_seed

from kvtune.cache import load
from kvtune.errors import UnsupportedError
from kvtune.recipe import Recipe

NEW = 14
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 3},
    "several returned": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "assistant": {"assistant_model": None},
    "chunked prefill": {"prefill_chunk_size": 16},
}
ROWS = {"prompt lookup": 1, "assistant": 1}  # transformers' own limit of assisted decoding
COMPRESSED = ["k4v2-windowed", "k2v4-bare", "derope-k4", "layers-apart", "v3-only", "heads-apart"]


@pytest.fixture
def generate(model_of: Any) -> Callable[..., Any]:
    """Generates in a mode of the list; the assistant is a smaller model of the same words."""

    def run(model: Any, tokens: Tensor, cache: Any, mode: str, **more: Any) -> Any:
        settings = {"do_sample": False, "max_new_tokens": NEW, **MODES[mode], **more}
        if mode == "assistant":
            settings["assistant_model"] = model_of("llama", seed=3, num_hidden_layers=1)
        set_seed(0)
        ones = torch.ones_like(tokens)
        return model.generate(tokens, attention_mask=ones, past_key_values=cache, **settings)

    return run


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_recipe_is_token_identical_to_the_dense_cache(
    name: str, model: Any, mode: str, generate: Any, draw: Any
) -> None:
    tokens = draw(ROWS.get(mode, 2), 30)
    dense = generate(model, tokens, DynamicCache(config=model.config), mode)
    assert torch.equal(generate(model, tokens, load(Recipe(), model), mode), dense)


def test_an_empty_recipe_is_token_identical_over_several_turns(
    name: str, model: Any, generate: Any, draw: Any
) -> None:
    caches = [DynamicCache(config=model.config), load(Recipe(), model)]
    talks = [draw(2, 20), draw(2, 20)]
    for turn in range(3):
        talks = [
            generate(model, talk, cache, "greedy")
            for talk, cache in zip(talks, caches, strict=True)
        ]
        assert torch.equal(talks[0], talks[1])
        talks = [torch.cat([talk, draw(2, 9, seed=turn)], 1) for talk in talks]


def logits_alone(model: Any, cache: Any, row: Tensor, prompt: int, play: Any) -> Tensor:
    """Returns the logits after the prompt, one row at a time and token by token."""
    steps = [1] * (len(row) - 1 - prompt)
    return play(model, cache, row[None, :-1], [prompt, *steps])[0, prompt - 1 :]


@pytest.mark.parametrize("mode", ["greedy", "sampling", "several returned"])
def test_each_row_is_generated_as_it_would_be_alone(
    llama_case: Any, mode: str, generate: Any, draw: Any, play: Any
) -> None:
    model, make = llama_case
    tokens = draw(2, 50)
    out = generate(model, tokens, make(), mode, return_dict_in_generate=True, output_logits=True)
    found = torch.stack(out.logits, 1)
    for row, logits in zip(out.sequences, found, strict=True):
        expected = logits_alone(model, make(), row, 50, play)
        torch.testing.assert_close(logits, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt", [6, 50])
@pytest.mark.parametrize("mode", ["beams", "beam sampling", "beams, several returned"])
@pytest.mark.parametrize("recipe_name", COMPRESSED)
def test_the_score_of_a_beam_is_that_of_its_text(
    llama: Any,
    recipe_name: str,
    mode: str,
    prompt: int,
    recipe_of: Any,
    generate: Any,
    draw: Any,
    play: Any,
) -> None:
    """Were a row of the cache not to follow its beam, the scores would be another text's."""
    recipe, tokens = recipe_of(recipe_name), draw(2, prompt)
    settings = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    cache = load(recipe, llama)
    out = generate(llama, tokens, cache, mode, max_new_tokens=40, **settings)
    for row, score in zip(out.sequences, out.sequences_scores, strict=True):
        logp = logits_alone(llama, load(recipe, llama), row, prompt, play).log_softmax(-1)
        expected = logp.gather(1, row[prompt:, None]).sum()
        torch.testing.assert_close(score.double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("recipe_name", ["k4v2-windowed", "derope-k4", "layers-apart"])
def test_turns_of_a_talk_continue_one_text(
    llama: Any, recipe_name: str, recipe_of: Any, generate: Any, draw: Any, play: Any
) -> None:
    recipe = recipe_of(recipe_name)
    cache, talk = load(recipe, llama), draw(2, 40)
    for turn in range(3):
        told = {"return_dict_in_generate": True, "output_logits": True}
        start = talk.shape[1]
        out = generate(llama, talk, cache, "greedy", **told)
        talk = torch.cat([out.sequences, draw(2, 30, seed=turn)], 1)
        for row, logits in zip(out.sequences, torch.stack(out.logits, 1), strict=True):
            alone = play(llama, load(recipe, llama), row[None, :-1], [40, *[1] * (len(row) - 41)])
            expected = alone[0, start - 1 :].float()
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert cache.get_seq_length() == out.sequences.shape[1] - 1


@pytest.mark.parametrize("mode", ["prompt lookup", "assistant"])
def test_assisted_decoding_within_the_window_is_greedy(
    name: str, model: Any, mode: str, written: Any, generate: Any, draw: Any
) -> None:
    recipe = written(
        keys='use = "affine", bits = 4, group = 32, axis = "channel"',
        values='use = "affine", bits = 3, group = "head"',
        sinks=4,
        recent=64,
    )
    tokens = draw(1, 105)  # 32 of them are paged; the next page closes with token 132
    greedy = generate(model, tokens, load(recipe, model), "greedy", max_new_tokens=22)
    cache = load(recipe, model)
    assisted = generate(model, tokens, cache, mode, max_new_tokens=22)
    assert torch.equal(assisted, greedy)
    assert cache.get_seq_length() in (126, 127)  # the last token is sometimes seen already


@pytest.mark.parametrize("prompt", [2, 60])
def test_assisted_decoding_never_loses_count(
    llama: Any, prompt: int, written: Any, generate: Any, draw: Any
) -> None:
    recipe = written(values='use = "affine", bits = 8, group = "head"', sinks=4, recent=8)
    out = generate(llama, draw(1, prompt), load(recipe, llama), "prompt lookup", max_new_tokens=60)
    assert out.shape == (1, prompt + 60)


@pytest.mark.parametrize("mode", ["prompt lookup", "assistant"])
def test_assisted_decoding_without_a_window_is_refused_by_name(
    llama: Any, mode: str, recipe_of: Any, generate: Any, draw: Any
) -> None:
    # repeats, so that lookup finds candidates; a page closes within the first ones
    tokens = torch.cat([draw(1, 31), draw(1, 31)], 1)
    with pytest.raises(UnsupportedError, match=r"Cannot crop \d+ tokens.*recent"):
        generate(llama, tokens, load(recipe_of("k2v4-bare"), llama), mode)


@pytest.mark.parametrize("recipe_name", COMPRESSED)
def test_rows_follow_their_indices(
    llama: Any, recipe_name: str, recipe_of: Any, draw: Any, play: Any
) -> None:
    recipe, order = recipe_of(recipe_name), torch.tensor([2, 2, 0])
    tokens = draw(3, 160)
    cache, moved, beams = (load(recipe, llama) for _ in range(3))
    expected = play(llama, cache, tokens, [90, *[1] * 70])[order, 90:]
    for other, move in ((moved, moved.batch_select_indices), (beams, beams.reorder_cache)):
        play(llama, other, tokens[:, :90], [90])
        move(order)
        found = play(llama, other, tokens[order, 90:], [70])
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("recipe_name", COMPRESSED)
def test_repeated_rows_are_the_same_rows(
    llama: Any, recipe_name: str, recipe_of: Any, draw: Any, play: Any
) -> None:
    recipe, tokens = recipe_of(recipe_name), draw(2, 160)
    cache, repeated = load(recipe, llama), load(recipe, llama)
    expected = play(llama, cache, tokens, [90, 70])[:, 90:].repeat_interleave(3, 0)
    play(llama, repeated, tokens[:, :90], [90])
    repeated.batch_repeat_interleave(3)
    found = play(llama, repeated, tokens[:, 90:].repeat_interleave(3, 0), [70])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
