"""The runtime's laws on the demo model: a real Llama, in the precision that users run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import DynamicCache

from kvtune import recipe as recipes
from kvtune.cache import load
from kvtune.models import facts

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "The history of the printing press begins in Mainz, where a goldsmith"
RECIPES = ("k4v2", "kivi-2", "smollm2-135m-instruct", "smollm2-135m-instruct-2.5bit")


def place(name: str) -> Path:
    single = ROOT / "recipes" / f"{name}.toml"
    return single if single.is_file() else ROOT / "recipes" / name


def shipped(name: str) -> recipes.Recipe:
    return recipes.load(place(name))


@pytest.fixture(scope="module")
def text(demo: tuple[Any, Any]) -> torch.Tensor:
    """Tokens [1, 260] of English."""
    from pydoc_data.topics import topics

    return demo[1](topics["async"], return_tensors="pt").input_ids[:, :260]


def test_an_empty_recipe_generates_what_a_plain_cache_does(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    inputs = tokenizer([PROMPT], return_tensors="pt")
    plain = DynamicCache(config=model.config)
    caches = (plain, load(shipped("empty"), model))
    first, second = (
        model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
        for cache in caches
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_chunks_read_what_single_steps_read(
    demo: tuple[Any, Any], text: torch.Tensor, name: str
) -> None:
    model, _ = demo

    def played(step: int) -> torch.Tensor:
        cache = load(place(name), model)
        model(text[:, :180], past_key_values=cache)
        pieces = text[:, 180:].split(step, 1)
        logits = [model(piece, past_key_values=cache).logits for piece in pieces]
        return torch.cat(logits, 1).log_softmax(-1)

    # a code may round the other way in single precision, so the distributions are compared
    single, chunked = played(1), played(27)
    assert kl_div(chunked, single, log_target=True, reduction="none").sum(-1).max() < 1e-4
    assert torch.equal(single.argmax(-1), chunked.argmax(-1))


@pytest.mark.parametrize("name", RECIPES)
def test_a_padded_row_speaks_as_it_does_alone(demo: tuple[Any, Any], name: str) -> None:
    model, tokenizer = demo
    tokenizer.padding_side = "left"
    texts = [PROMPT * 9, PROMPT * 7]

    def spoken(batch: list[str]) -> list[str]:
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        cache = load(place(name), model)
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
        return list(tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :]))

    assert spoken(texts) == [spoken([one])[0] for one in texts]


def test_the_tuned_recipe_is_bound_to_this_model(demo: tuple[Any, Any]) -> None:
    tuned = shipped("smollm2-135m-instruct")
    assert tuned.model is not None
    assert tuned.policies(facts(demo[0].config))
    assert tuned.measured["kl"] <= 0.02
